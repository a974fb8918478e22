"""Extract an adapter's two files, or a file of rows, from an untrusted multipart body.

The body is spooled to disk while it is received. An adapter's tensors are then copied into a separate file, which
can be memory-mapped. `server.api.zips` reads archives; `adapters.peft.files` and `server.training.row_files`
parse the files.
"""

import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from anyio import to_thread
from fastapi import Request
from python_multipart.exceptions import ParseError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from adapters.errors import FieldError, InvalidInput
from adapters.peft.files import WEIGHTS_NAME
from server.api import zips
from server.api.bodies import drain
from server.api.deps import Services
from server.api.quotas import owners_of, require_quota
from server.errors import Unavailable
from server.training import row_files

CONFIG_FIELD = "adapter_config"
WEIGHTS_FIELD = "adapter_model"
ARCHIVE_FIELD = zips.FIELD
ROWS_FIELD = row_files.FILE
MAX_CONFIG_BYTES = 1 << 20
_CHUNK = 1 << 20
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"iso-8859-1")


@dataclass(frozen=True)
class UploadedFiles:
    """An uploaded adapter: the configuration's bytes, and the path of a temporary file with the tensors."""

    config_json: bytes
    weights: Path

    @property
    def num_bytes(self) -> int:
        """Size of both files in bytes. The archive that they were in may have been smaller."""
        return len(self.config_json) + self.weights.stat().st_size


@asynccontextmanager
async def received_form(request: Request, services: Services) -> AsyncIterator[FormData]:
    """Yield the request's multipart form, spooled to disk. Its bytes count towards quotas until the context ends.

    Before the body is read, raise QueueFull if there are too many uploads, Unavailable if the disk is nearly full,
    or Forbidden if a quota would be exceeded. While the body is read, raise Unavailable if the disk fills up, or
    InvalidInput if the body isn't a form. If the files are larger than the Content-Length, the quotas are checked
    again, and Forbidden is raised if one would be exceeded.
    """
    incoming, owners = services.limiters.incoming, owners_of(services)
    with services.limiters.uploads.taken(services.principal.project):
        announced = request.headers.get("content-length", "")
        num_bytes = int(announced) if announced.isascii() and announced.isdigit() else 0
        with incoming.adding(owners, num_bytes) as before:
            with services.limiters.spooling.announced(services.settings, num_bytes) as received:
                await to_thread.run_sync(require_quota, services, num_bytes, before)
                form = await _read_form(_spooled(request, received))
            try:
                more = max(0, form_bytes(form) - num_bytes)
                with incoming.adding(owners, more) as before:
                    if more:
                        await to_thread.run_sync(require_quota, services, more, before)
                    yield form
            finally:
                await form.close()


def form_bytes(form: FormData) -> int:
    """Return the total size of the form's files."""
    return sum(part.size or 0 for _, part in form.multi_items() if isinstance(part, UploadFile))


def _spooled(request: Request, received: Callable[[int], None]) -> Request:
    """Return a request that passes the size of each piece of its body to `received`.

    If `received` raises Unavailable, the rest of the body is read and discarded.
    """

    async def receive() -> Message:
        message = await request.receive()
        try:
            received(len(message.get("body", b"")))
        except Unavailable:
            await drain(request.scope, request.receive)
            raise
        return message

    return Request(request.scope, receive)


async def _read_form(request: Request) -> FormData:
    _, parameters = parse_options_header(request.headers.get("content-type"))
    if parameters.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        # some of Python's codecs raise unusual errors, or decode to text that can't be encoded
        raise InvalidInput.of("body", "has an unsupported charset: leave it out, names are UTF-8")
    try:
        return await request.form(max_files=8, max_fields=8, max_part_size=MAX_CONFIG_BYTES)
    except (HTTPException, ParseError) as error:  # depending on Starlette's release
        if isinstance(error, HTTPException) and error.status_code != 400:
            raise
        raise InvalidInput.of("body", "must be a multipart/form-data body") from None


@contextmanager
def uploaded_files(form: FormData) -> Iterator[UploadedFiles]:
    """Yield an adapter's files, which were sent as two parts or as one archive.

    Raise InvalidInput if the form doesn't have them. This does disk I/O, so it may block.
    """
    _refuse_unknown(form, CONFIG_FIELD, WEIGHTS_FIELD, ARCHIVE_FIELD)
    config, weights, archive = (
        None if part is None else part.file
        for part in (_part(form, name) for name in (CONFIG_FIELD, WEIGHTS_FIELD, ARCHIVE_FIELD))
    )
    # if this process is killed, the next start removes directories with this prefix
    with TemporaryDirectory(prefix="upload-", ignore_cleanup_errors=True) as scratch:
        target = Path(scratch) / WEIGHTS_NAME
        if archive is not None and config is None and weights is None:
            yield UploadedFiles(zips.read_archive(archive, target, MAX_CONFIG_BYTES), target)
        elif config is not None and weights is not None and archive is None:
            with target.open("wb") as file:
                shutil.copyfileobj(weights, file, _CHUNK)
            yield UploadedFiles(_bounded(config), target)
        elif config is None and weights is None and archive is None:
            needs = f"send {CONFIG_FIELD} and {WEIGHTS_FIELD}, or one zip of both in {ARCHIVE_FIELD}"
            raise InvalidInput.of(CONFIG_FIELD, needs)
        elif archive is not None:
            raise InvalidInput.of(ARCHIVE_FIELD, "send the two files or one archive of them, not both")
        else:
            missing = CONFIG_FIELD if config is None else WEIGHTS_FIELD
            raise InvalidInput.of(missing, "is missing: send both files, or one zip of both in archive")


def uploaded_rows(form: FormData, *others: str) -> tuple[BinaryIO, str]:
    """Return the form's file of rows, and the file's name. `others` names the other fields that are allowed.

    Raise InvalidInput if the file is missing or the form has any other field.
    """
    _refuse_unknown(form, ROWS_FIELD, *others)
    part = _part(form, ROWS_FIELD)
    if part is None:
        raise InvalidInput.of(ROWS_FIELD, "is missing: send the file as multipart/form-data")
    return part.file, part.filename or ""


def _refuse_unknown(form: FormData, *known: str) -> None:
    if unknown := sorted(set(form.keys()) - set(known)):
        raise InvalidInput([FieldError((name[:64],), f"no such field: {_fields(known)}") for name in unknown])


def _fields(known: Sequence[str]) -> str:
    return f"there is {known[0]}" if len(known) == 1 else f"there are {', '.join(known[:-1])} and {known[-1]}"


def _part(form: FormData, name: str) -> UploadFile | None:
    found = form.getlist(name)
    if not found:
        return None
    if len(found) > 1:
        raise InvalidInput.of(name, "sent more than once")
    part = found[0]
    if not isinstance(part, UploadFile):
        raise InvalidInput.of(name, "send it as a file, with a filename")
    return part


def _bounded(source: BinaryIO) -> bytes:
    content = source.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise InvalidInput.of(CONFIG_FIELD, f"is larger than {MAX_CONFIG_BYTES} bytes: are the two files swapped?")
    return content
