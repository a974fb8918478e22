"""A cold adapter's answers are bitwise equal whether it is read from the published file or from the packed one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import AdapterFiles
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.kits.native import native_library

pytestmark = pytest.mark.real

PROMPT = "Once upon a time, in a village by the sea,"
FATES: dict[str, Callable[[Path], object]] = {
    "mapped": lambda file: None,
    "removed": lambda file: file.unlink(),
    "torn": lambda file: file.write_bytes(file.read_bytes()[:-4096]),
}
"""What happens to an adapter's packed file between two servers."""


def choices(server: ServerProcess, adapter: str) -> list[Any]:
    answer = server.generate(PROMPT, adapter=adapter, max_tokens=12, logprobs=3)
    assert answer["usage"]["cached_tokens"] == 0
    found: list[Any] = answer["choices"]
    return found


@pytest.mark.thorough
def test_answers_are_equal_with_and_without_a_packed_file(
    base_dir: Path, adapter_files: AdapterFiles, tmp_path: Path
) -> None:
    native_library()
    home = tmp_path / "home"
    folder = home / "adapters" / "packed"
    kinds: dict[str, Callable[[int], Path]] = {
        "plain": adapter_files.make,
        "some": partial(adapter_files.make, rank=5, modules=["q_proj", "down_proj"]),
    }
    digests: dict[str, str] = {}

    def answers() -> dict[str, list[Any]]:
        """Return a freshly started server's answers with every adapter, and with a blend of each pair."""
        server = ServerProcess(home, base_dir=base_dir)
        found = {}
        try:
            for number, fate in enumerate(FATES):
                for kind, make in kinds.items():
                    name = f"{kind}-{fate}"
                    if name not in digests:
                        digests[name] = server.upload(name, make(41 + number))["digest"]
                        assert (folder / digests[name]).exists(), "before anybody asks for it"
                    found[name] = choices(server, name)
                    wait_until((folder / digests[name]).exists)  # one is written at a time
                found[fate] = choices(server, f"plain-{fate}*0.6 + some-{fate}*0.5")
        finally:
            server.close()
        return found

    uploaded = answers()
    files = {digest: (folder / digest).read_bytes() for digest in digests.values()}
    assert len(files) == len(digests) == len(FATES) * len(kinds)
    assert {path.name for path in folder.iterdir()} == set(files)
    for fate in FATES:
        assert uploaded[f"plain-{fate}"] != uploaded[f"some-{fate}"]
    for name, digest in digests.items():
        FATES[name.partition("-")[2]](folder / digest)
    assert answers() == uploaded
    for digest, content in files.items():
        assert (folder / digest).read_bytes() == content, "made anew"


def test_packed_file_is_deleted_with_its_adapter(
    base_dir: Path, adapter_files: AdapterFiles, tmp_path: Path
) -> None:
    native_library()
    server = ServerProcess(tmp_path, base_dir=base_dir)
    try:
        digest = server.upload("gone", adapter_files.make(43))["digest"]
        file = tmp_path / "adapters" / "packed" / digest
        assert file.stat().st_mode & 0o777 == 0o600
        assert server.client.delete("/adapters/gone").status_code == 204
        assert not file.exists()
    finally:
        server.close()
