"""An adapter's two files out of a zip archive that nobody vouches for.

It is never unpacked: two entries are read, by name, up to bounds that hold whatever the archive's headers claim.
"""

import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adapters.errors import InvalidInput
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from adapters.peft.tensor_file import SAVE_ANEW

FIELD = "archive"
MAX_WEIGHTS_BYTES = 512 << 20
"""Of the tensors once inflated. Weights hardly deflate: this is no less than any upload can hold."""
MAX_ENTRIES = 1000
_MAX_DIRECTORY_BYTES = 1 << 20  # of the archive's list of entries, all of which Python reads into memory
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_END = struct.Struct("<4s4H2LH")
_CHUNK = 1 << 20


def read_archive(file: BinaryIO, weights: Path, max_config: int, max_weights: int = MAX_WEIGHTS_BYTES) -> bytes:
    """Copy the tensors' file to `weights`; the config's bytes. Raises InvalidInput on `archive`."""
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            config_entry, weights_entry = _entries(archive)
            with archive.open(weights_entry) as source, weights.open("wb") as target:
                size = 0
                while chunk := source.read(_CHUNK):
                    size += len(chunk)
                    if size > max_weights:
                        raise _refused(f"{WEIGHTS_NAME} inflates to more than {max_weights} bytes")
                    target.write(chunk)
            with archive.open(config_entry) as source:
                config = source.read(max_config + 1)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError):
        # RuntimeError and NotImplementedError: encrypted, or packed in a way that Python doesn't know
        raise _refused("is not a plain, complete zip file: put the two files that PEFT saved into one") from None
    if len(config) > max_config:
        raise _refused(f"{CONFIG_NAME} may have {max_config} bytes")
    return config


def _check_directory(file: BinaryIO) -> None:
    """Refuse a list of entries that would fill the memory, before Python reads it."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _END.size - 0xFFFF))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise _refused("is not a plain, complete zip file: put the two files that PEFT saved into one")
    if tail[max(0, at - 20) :].startswith(b"PK\x06\x07"):
        raise _refused("is in the zip64 format, which an adapter's two files don't need")
    directory_bytes = _END.unpack_from(tail, at)[5]
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise _refused(f"has more than {MAX_ENTRIES} files")


def _entries(archive: zipfile.ZipFile) -> tuple[zipfile.ZipInfo, zipfile.ZipInfo]:
    """The config's and the tensors' entry: in the archive's root, or together in one folder of it."""
    # not `is_dir`, which fails on an empty name
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    if len(infos) > MAX_ENTRIES:
        raise _refused(f"has more than {MAX_ENTRIES} files")
    found: dict[str, zipfile.ZipInfo] = {}
    folders: set[PurePosixPath] = set()
    for info in infos:
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.name not in (CONFIG_NAME, WEIGHTS_NAME):
            continue
        if path.is_absolute() or ".." in path.parts or len(path.parts) > 2:
            raise _refused(f"{path.name} must be in its root, or in one folder of it")
        if path.name in found:
            raise _refused(f"has more than one {path.name}")
        if info.flag_bits & 0x1:
            raise _refused(f"{path.name} is encrypted")
        if info.compress_type not in _METHODS:  # others may ask for gigabytes to inflate a byte
            raise _refused(f"{path.name} is packed otherwise than stored or deflated")
        found[path.name] = info
        folders.add(path.parent)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if name not in found:
            has_bin = name == WEIGHTS_NAME and any(info.filename.endswith("adapter_model.bin") for info in infos)
            advice = f": adapter_model.bin isn't read; {SAVE_ANEW}" if has_bin else ""
            raise _refused(f"has no {name}{advice}")
    if len(folders) > 1:
        raise _refused("has its two files in different folders")
    return found[CONFIG_NAME], found[WEIGHTS_NAME]


def _refused(reason: str) -> InvalidInput:
    return InvalidInput.of(FIELD, reason)
