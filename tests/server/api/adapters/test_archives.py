"""Untrusted zip archives."""

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from adapters.errors import InvalidInput
from server.api import zips
from server.api.zips import read_archive

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b"{}", WEIGHTS: b"w" * 5000}


def zipped(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer


def refusal(file: io.BytesIO, target: Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        read_archive(file, target, 1000)
    assert caught.value.errors[0].loc == ("archive",)
    return str(caught.value)


@pytest.mark.parametrize("folder", ["", "my-adapter/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_two_files_in_the_root_or_one_folder(tmp_path: Path, folder: str, method: int) -> None:
    target = tmp_path / "weights"
    extra = {folder + "README.md": b"hello", "__MACOSX/._junk": b"x"}
    files = {folder + name: content for name, content in FILES.items()} | extra
    assert read_archive(zipped(files, method), target, 1000) == b"{}"
    assert target.read_bytes() == FILES[WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({CONFIG: b"{}"}, f"no {WEIGHTS}"),
        ({CONFIG: b"{}", "adapter_model.bin": b"PK"}, f"no {WEIGHTS}: adapter_model.bin isn't read; load"),
        ({WEIGHTS: b""}, f"no {CONFIG}"),
        ({}, "no adapter"),
        ({f"a/{CONFIG}": b"", f"b/{WEIGHTS}": b""}, "different folders"),
        ({CONFIG: b"", WEIGHTS: b"", f"a/{CONFIG}": b""}, "more than one"),
        ({f"a/b/{CONFIG}": b"", f"a/b/{WEIGHTS}": b""}, "in its root"),
        ({f"../{CONFIG}": b"", f"../{WEIGHTS}": b""}, "in its root"),
        ({f"/{CONFIG}": b"", f"/{WEIGHTS}": b""}, "in its root"),
        ({CONFIG: b"x" * 1001, WEIGHTS: b""}, "is larger than 1000 bytes"),
        ({**FILES, **{f"f{n}": b"" for n in range(zips.MAX_ENTRIES)}}, "more than 1000 files"),
    ],
)
def test_refused(tmp_path: Path, files: Mapping[str, bytes], reason: str) -> None:
    assert reason in refusal(zipped(files), tmp_path / "weights")
    assert not (tmp_path / ".." / CONFIG).exists()


def test_zip_bombs_stop_at_the_limit(tmp_path: Path) -> None:
    bomb = zipped({CONFIG: b"{}", WEIGHTS: bytes(20 << 20)})
    assert bomb.getbuffer().nbytes < 100_000
    with pytest.raises(InvalidInput, match="inflates"):
        read_archive(bomb, tmp_path / "weights", 1000, max_weights=3 << 20)
    assert (tmp_path / "weights").stat().st_size <= 3 << 20


def test_a_list_of_entries_that_would_fill_the_memory(tmp_path: Path) -> None:
    file = zipped(FILES)
    content = bytearray(file.getvalue())
    at = content.rfind(b"PK\x05\x06")
    struct.pack_into("<L", content, at + 12, 2 << 20)
    assert "files" in refusal(io.BytesIO(content), tmp_path / "weights")
    locator = b"PK\x06\x07" + bytes(16)
    assert "zip64" in refusal(io.BytesIO(content[:at] + locator + content[at:]), tmp_path / "weights")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_are_refused(tmp_path: Path, method: int) -> None:
    assert "compressed by another method" in refusal(zipped(FILES, method), tmp_path / "weights")


def test_encrypted_entries_are_refused(tmp_path: Path) -> None:
    content = bytearray(zipped(FILES).getvalue())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := content.find(signature, at + 1)) >= 0:
            content[at + offset] |= 1
    assert "encrypted" in refusal(io.BytesIO(content), tmp_path / "weights")


@pytest.mark.parametrize("cut", [0, 1, 50, 200])
def test_a_file_cut_short_is_no_zip(tmp_path: Path, cut: int) -> None:
    assert "not a plain, complete zip" in refusal(io.BytesIO(zipped(FILES).getvalue()[:cut]), tmp_path / "weights")


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    content = bytearray(zipped(FILES, zipfile.ZIP_STORED).getvalue())
    content[content.find(b"wwww") + 10] ^= 1
    assert "not a plain, complete zip" in refusal(io.BytesIO(content), tmp_path / "weights")


def test_a_name_may_be_empty(tmp_path: Path) -> None:
    """Python ends names at a NUL, and `is_dir` then fails. Found by `make attack`."""
    data = zipped({**FILES, "!empty": b""}).getvalue().replace(b"!empty", b"\0empty")
    assert read_archive(io.BytesIO(data), tmp_path / "weights", 1000) == b"{}"
