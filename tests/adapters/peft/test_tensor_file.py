"""Compare our reader and writer with the safetensors library."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from adapters.peft.tensor_file import DTYPES, TensorFileError, copy_bytes, map_file, read_header, write
from tests.kits.properties import num_examples

HEADER = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def file_of(header: object, data: bytes = b"\0" * 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_reads_files_of_the_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 1, 3).half(),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "more": "text"})
    for buffer in (map_file(path), copy_bytes(path.read_bytes())):
        entries = read_header(buffer)
        assert set(entries) == set(tensors)
        for name, tensor in tensors.items():
            view = entries[name].view(buffer)
            assert view.dtype == tensor.dtype
            assert torch.equal(view, tensor)


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3).half(),
        "float": torch.randn(4, 3).t(),
        "é": torch.randn(5).to(torch.bfloat16),
    }
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        write(file, tensors)
    read = safetensors.torch.load_file(path)
    assert set(read) == set(tensors)
    assert all(
        torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    entries = read_header(map_file(path))
    assert list(entries) == ["float", "half", "é"]
    assert entries["float"].start % 64 == 0


def test_a_misaligned_tensor_is_copied() -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    text = json.dumps(HEADER).encode()
    text += b" " * (-len(text) % 8 + 1)
    buffer = copy_bytes(file_of(text, tensor.numpy().tobytes()))
    assert torch.equal(read_header(buffer)["a"].view(buffer), tensor)


def test_a_mapping_outlives_its_file_and_never_changes_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    buffer = map_file(path)
    view = read_header(buffer)["a"].view(buffer)
    view += 1
    assert path.read_bytes() == before
    path.unlink()
    assert view.tolist() == [2.0, 2.0]


BAD: dict[str, bytes] = {
    "empty": b"",
    "no length": b"\1\0\0",
    "length beyond the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "length of 2^64": b"\xff" * 8 + b"{}",
    "no JSON": file_of(b"{"),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of([]),
    "deep": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "endless number": file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,24]}}'),
    "offset without end": file_of(b'{"a":{"dtype":"X","shape":[],"data_offsets":[0,' + b"9" * 4300 + b"]}}"),
    "NaN": file_of(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}'),
    "twice": file_of(json.dumps(HEADER).encode()[:-1] + b"," + json.dumps(HEADER).encode()[1:]),
    "metadata that is no text": file_of({**HEADER, "__metadata__": {"a": 1}}),
    "metadata that is no object": file_of({**HEADER, "__metadata__": []}),
    "cut short": file_of(HEADER, b"\0" * 20),
    "bytes left over": file_of(HEADER, b"\0" * 25),
    "negative offset": file_of({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [-24, 0]}}),
    "backward offsets": file_of({"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}),
    "other size": file_of({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 24]}}),
    "overflowing size": file_of({"a": {"dtype": "F32", "shape": [1 << 63, 8], "data_offsets": [0, 24]}}),
    "fraction": file_of({"a": {"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]}}),
    "truth": file_of({"a": {"dtype": "F32", "shape": [6, True], "data_offsets": [0, 24]}}),
    "no dtype": file_of({"a": {"shape": [2, 3], "data_offsets": [0, 24]}}),
    "more keys": file_of({"a": {**HEADER["a"], "x": 1}}),
    "overlap": file_of({**HEADER, "b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}),
    "gap": file_of({**HEADER, "b": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}}, b"\0" * 32),
}
STRICTER = ("more keys", "twice")  # than the library


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused(name: str) -> None:
    with pytest.raises(TensorFileError):
        read_header(copy_bytes(BAD[name]))
    if name not in STRICTER:
        with pytest.raises(SafetensorError):
            safetensors.torch.load(BAD[name])


@given(st.data())
@settings(max_examples=num_examples(200), deadline=None)
def test_damaged_files_are_refused_or_read_as_by_the_library(data: st.DataObject) -> None:
    whole = safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.ones(4).half()})
    damage: Callable[[], Any] = lambda: data.draw(st.integers(0, len(whole) - 1))  # noqa: E731
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[damage()] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del broken[damage() :]
    try:
        buffer = copy_bytes(bytes(broken))
        entries = read_header(buffer)
    except TensorFileError:
        return
    if all(entry.dtype in DTYPES for entry in entries.values()):  # other dtypes are refused later, for each tensor
        theirs = safetensors.torch.load(bytes(broken))
        assert set(entries) == set(theirs)
        for name, entry in entries.items():
            assert torch.equal(entry.view(buffer).view(torch.uint8), theirs[name].view(torch.uint8))
