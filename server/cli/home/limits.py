"""The limits of a key or a project as options, and in words."""

from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from adapters.errors import FieldError, InvalidInput
from server.access.principal import LIMITS, Quota
from server.counted import counted

RequestsOption = Annotated[int | None, typer.Option(help="Requests other than GET. Default: no limit.")]
TokensOption = Annotated[
    int | None, typer.Option(help="Of prompts, and of answers as long as they may become. Default: no limit.")
]
JobsOption = Annotated[int | None, typer.Option(help="Jobs that haven't ended. Default: no limit.")]
BytesOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Stored adapters, data sets and files, such as 2GiB. Default: no limit."),
]

_UNITS = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}


def quota_of(
    requests_per_minute: int | None, tokens_per_minute: int | None, max_jobs: int | None, max_bytes: str | None
) -> Quota:
    """What the options say, within the bounds of POST /keys. Raises InvalidInput with the fields at fault."""
    from server.api.accounts.schemas import LimitFields

    num_bytes = None if max_bytes is None else _num_bytes(max_bytes)
    values = (requests_per_minute, tokens_per_minute, max_jobs, num_bytes)
    try:
        return LimitFields.model_validate(dict(zip(LIMITS, values, strict=True))).quota
    except ValidationError as error:
        message = "must be 1 or more, and below 2^53: leave it out for no limit"
        raise InvalidInput([FieldError(fault["loc"], message) for fault in error.errors()]) from None


def told(quota: Quota) -> str:
    """Those that there are: `60 requests a minute, 2GiB`."""
    parts = [
        _counted(quota.requests_per_minute, "request", " a minute"),
        _counted(quota.tokens_per_minute, "token", " a minute"),
        _counted(quota.max_jobs, "unfinished job"),
        "" if quota.max_bytes is None else _size(quota.max_bytes),
    ]
    return ", ".join(filter(None, parts))


def _num_bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except (ValidationError, OverflowError):
        raise InvalidInput.of("max_bytes", "must be a size, such as 2GiB, or a number of bytes") from None


def _counted(limit: int | None, noun: str, per: str = "") -> str:
    return "" if limit is None else counted(limit, noun) + per


def _size(num_bytes: int) -> str:
    """In the largest unit that says it exactly, so that it may be given back."""
    for unit, size in _UNITS.items():
        if num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return counted(num_bytes, "byte")
