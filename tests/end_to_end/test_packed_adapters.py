"""A cold adapter's answers are the same, bit for bit, however it came: from what was published, or packed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import AdapterFiles
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.native_kit import native_library

pytestmark = pytest.mark.real

PROMPT = "Once upon a time, in a village by the sea,"


def choices(server: ServerProcess, adapter: str) -> list[Any]:
    answer = server.generate(PROMPT, adapter=adapter, max_tokens=12, logprobs=3)
    assert answer["usage"]["cached_tokens"] == 0
    found: list[Any] = answer["choices"]
    return found


def test_answers_are_the_same_from_a_packed_file_and_without_one(
    base_dir: Path, adapter_files: AdapterFiles, tmp_path: Path
) -> None:
    native_library()
    home = tmp_path / "home"
    folder = home / "adapters" / "packed"
    adapters = {
        "plain": adapter_files.make(41),
        "some": adapter_files.make(42, rank=5, modules=["q_proj", "down_proj"]),
    }

    def answers(change: Callable[[Path], object]) -> dict[str, list[Any]]:
        """Of a server that begins with nothing in memory, once every packed file has been changed."""
        for file in folder.glob("*"):
            change(file)
        server = ServerProcess(home, base_dir=base_dir)
        try:
            found = {}
            for name, directory in adapters.items():
                if name not in digests:
                    digests[name] = server.upload(name, directory)["digest"]
                    assert (folder / digests[name]).exists(), "before anybody asks for it"
                found[name] = choices(server, name)
                wait_until((folder / digests[name]).exists)  # one is written at a time
            found["blend"] = choices(server, "plain*0.6 + some*0.5")
        finally:
            server.close()
        return found

    digests: dict[str, str] = {}
    uploaded = answers(lambda file: None)
    files = {digest: (folder / digest).read_bytes() for digest in digests.values()}
    assert {path.name for path in folder.iterdir()} == set(files)
    assert uploaded["plain"] != uploaded["some"]
    mapped = answers(lambda file: None)
    removed = answers(lambda file: file.unlink())
    torn = answers(lambda file: file.write_bytes(file.read_bytes()[:-4096]))
    assert mapped == removed == torn == uploaded
    for digest, content in files.items():
        assert (folder / digest).read_bytes() == content, "made anew"


def test_it_goes_when_the_adapter_is_deleted(base_dir: Path, adapter_files: AdapterFiles, tmp_path: Path) -> None:
    native_library()
    server = ServerProcess(tmp_path, base_dir=base_dir)
    try:
        digest = server.upload("gone", adapter_files.make(43))["digest"]
        file = tmp_path / "adapters" / "packed" / digest
        assert file.stat().st_mode & 0o777 == 0o644
        assert server.client.delete("/adapters/gone").status_code == 204
        assert not file.exists()
    finally:
        server.close()
