"""Zip archives of an adapter's two files: any bytes, or archives with manipulated entries."""

import functools
import io
import re
import tempfile
import warnings
import zipfile
from pathlib import Path

from adapters.errors import InvalidInput
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from server.api.zips import FIELD, MAX_ENTRIES, StoredZip, read_archive
from tests.stress.fuzzing.choices import Choices
from tests.stress.fuzzing.target import Target, check_refusal

MAX_CONFIG = 1 << 12
MAX_WEIGHTS = 1 << 16
NAMES = (
    *(CONFIG_NAME, WEIGHTS_NAME, f"a/{CONFIG_NAME}", f"a/{WEIGHTS_NAME}", f"../{CONFIG_NAME}", f"/{WEIGHTS_NAME}"),
    *(f"a\\{CONFIG_NAME}", f"a/b/{WEIGHTS_NAME}", "README.md", "a/", "", "é.json", f"./{CONFIG_NAME}"),
)
METHODS = (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 9, 99)
"""Compression methods that are claimed falsely; the decoders refuse such entries."""
SIZES = (3, 0, 100, 4095, 4096, 4097, 1 << 16, (1 << 16) + 1, 1 << 20)
_WORDS = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"\xff\xff\xff\xff", b"\0\0")
_RAW, _MADE = 0, 1


def run(data: bytes) -> str:
    choices = Choices(data)
    archive = choices.rest if choices.below(2) == _RAW else _made(choices)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / WEIGHTS_NAME
        try:
            config: bytes | None = read_archive(io.BytesIO(archive), weights, MAX_CONFIG, MAX_WEIGHTS)
        except InvalidInput as error:
            check_refusal(error, (FIELD,))
            config = None
        assert config is None or len(config) <= MAX_CONFIG
        assert not weights.exists() or weights.stat().st_size <= MAX_WEIGHTS
    return "refused" if config is None else "read"


def _made(choices: Choices) -> bytes:
    names = [CONFIG_NAME, WEIGHTS_NAME]
    for _ in range(choices.below(4)):
        names.append(choices.pick(NAMES))
        if choices.one_in(3):
            del names[choices.below(len(names))]
    buffer = io.BytesIO(many() if choices.one_in(64) else b"")
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as archive:
        warnings.simplefilter("ignore")  # about duplicate names
        for name in names:
            entry = zipfile.ZipInfo(name or choices.text().encode("utf-8", "replace").decode())
            entry.compress_type = choices.pick((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))
            content = choices.take(2) or b"{}"
            archive.writestr(entry, content * (choices.pick(SIZES) // len(content)))
    data = bytearray(buffer.getvalue())
    if choices.one_in(8):
        data = bytearray(re.sub(rb"(?s)(PK\x01\x02.{6})..", rb"\g<1>%c\0" % choices.pick(METHODS), data))
    for _ in range(choices.below(6)):  # manipulations, mostly of the central directory at the end
        at = choices.below(min(len(data), 400))
        at = at if choices.one_in(4) else len(data) - 1 - at
        lie = choices.pick(_WORDS) if choices.one_in(3) else choices.take(1)
        data[at : at + len(lie)] = lie
    if choices.one_in(8):
        del data[choices.below(len(data)) :]
    return bytes(data)


@functools.cache
def many() -> bytes:
    """Return an archive with more files than allowed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(MAX_ENTRIES + 1):
            archive.writestr(f"{number}", b"")
    return buffer.getvalue()


def seeds() -> list[bytes]:
    files = {CONFIG_NAME: b'{"r": 1}', WEIGHTS_NAME: bytes(50)}
    found = [b"".join(StoredZip({name: io.BytesIO(content) for name, content in files.items()}).chunks())]
    for folder in ("", "a/"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(folder + name, content)
        found.append(buffer.getvalue())
    return [*(bytes([_RAW]) + archive for archive in found), bytes([_MADE]), bytes([_MADE]) + bytes(range(40))]


TARGET = Target(run, seeds, max_len=2048, words=(*_WORDS, CONFIG_NAME.encode(), WEIGHTS_NAME.encode()))
