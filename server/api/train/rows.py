"""Which rows a job trains on and which it holds out: from the body, from data sets, or a share of either."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adapters.errors import FieldError, InvalidInput, NotFound
from server.api.train.schemas import TrainBody
from server.training.data.canonical_rows import CanonicalRows
from server.training.data.files import RowSources
from server.training.data.ignored import IgnoredFields
from server.training.data.rows import Row, parse_row
from server.training.data.split import default_share, hold_out

MAX_FAULTS = 20
"""Faults of rows that one answer names."""


@dataclass(frozen=True)
class JobRows:
    """`name` is the field that `rows` came from, `validation_name` that of held-out rows that are no share."""

    rows: CanonicalRows = field(repr=False)
    train: CanonicalRows = field(repr=False)
    validation: CanonicalRows = field(repr=False)
    name: str
    validation_name: str | None
    source: Mapping[str, object]  # as the body has it
    used: frozenset[str]  # ids of data sets and files
    warnings: tuple[str, ...]  # of fields that are passed over


def choose_rows(body: TrainBody, sources: RowSources) -> JobRows:
    """The rows, of which at least one is to be trained on.

    Raises InvalidInput naming rows and their fields, NotFound where there is no such data set.
    """
    ignored = IgnoredFields()
    if body.dataset is not None:
        name, rows = "dataset", _stored(sources, body.dataset, "dataset", ignored)
    else:
        assert body.data is not None, "one of the two, as was checked"
        name, rows = "data", _sent(body.data, "data", ignored)
    given = body.validation
    used = {named for named in (body.dataset, given) if isinstance(named, str)}
    train = rows
    validation_name: str | None = "validation"
    said: object = given
    if isinstance(given, str):
        validation = _stored(sources, given, "validation", ignored)
    elif isinstance(given, list):
        validation, said = _sent(given, "validation", ignored), "rows"
    else:
        said = share = default_share(len(rows)) if given is None else given
        train, validation = hold_out(rows, share)
        validation_name = None
    source = {"dataset": body.dataset, "validation": said}
    return JobRows(
        rows, train, validation, name, validation_name, source, frozenset(used), tuple(ignored.warnings())
    )


def _stored(sources: RowSources, source_id: str, name: str, ignored: IgnoredFields) -> CanonicalRows:
    try:
        return sources.rows(source_id, ignored)
    except NotFound as error:
        raise NotFound(f"{name}: {error}") from None


def _sent(values: Sequence[object], name: str, ignored: IgnoredFields) -> CanonicalRows:
    rows: list[Row] = []
    faults: list[FieldError] = []
    for number, value in enumerate(values):
        try:
            rows.append(parse_row(value, ignored))
        except InvalidInput as error:
            faults += _placed(error, name, number)
            if len(faults) >= MAX_FAULTS:
                more = FieldError((name,), "rows after these may be at fault, too")
                raise InvalidInput([*faults[:MAX_FAULTS], more]) from None
    if faults:
        raise InvalidInput(faults)
    return CanonicalRows.of(rows)


def _placed(error: InvalidInput, name: str, number: int) -> Iterator[FieldError]:
    """The row's faults as those of the body's field."""
    for fault in error.errors:
        if fault.loc == ("row",):  # what isn't even an object has no field at fault
            yield FieldError((name,), f"row {number} {fault.message}")
        else:
            yield FieldError((name, number, *fault.loc), fault.message)
