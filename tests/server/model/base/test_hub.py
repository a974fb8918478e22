"""Downloads, with the hub's own client, from a hub of one model on this machine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.errors import StartupError
from server.model.base.hub import download
from server.model.base.source import HubModel, hub_model, resolve_base
from server.model.base.weights import load_base, read_manifest
from tests.kits.fake_hub import COMMIT, HubHandler, serving

UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "run.py": b"code",
    "onnx/config.json": b"{}",
    "onnx/m.safetensors": b"",
}


@contextmanager
def hub_of(directory: Path, asked: list[str]) -> Iterator[str]:
    """Serve the files of `directory` as owner/tiny, with others that must not be requested; yield the endpoint."""
    files = {file.name: file.read_bytes() for file in directory.iterdir()} | UNWANTED

    class Handler(HubHandler):
        def find(self) -> tuple[bytes | None, str]:
            asked.append(self.path)
            if self.path.startswith(f"/api/models/owner/tiny/tree/{COMMIT}"):
                tree = [
                    {"type": "file", "path": name, "oid": "0" * 40, "size": len(b)} for name, b in files.items()
                ]
                return json.dumps(tree).encode(), ""
            if self.path.startswith("/api/models/owner/tiny"):
                siblings = [{"rfilename": name} for name in files]
                return json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode(), ""
            if self.path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
                return files[self.path.removeprefix(f"/owner/tiny/resolve/{COMMIT}/")], ""
            return None, "RepoNotFound"

    with serving(Handler) as endpoint:
        yield endpoint


def test_one_commit_of_safetensors_and_json_only_then_offline(tiny_base_dir: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    with hub_of(tiny_base_dir, asked) as endpoint:
        found = resolve_base(
            "owner/tiny", tmp_path, fetch=lambda model: download(model, endpoint, tmp_path / "hub")
        )
        resolved = {path.rsplit("/", 1)[1] for path in asked if "/resolve/" in path}
        assert resolved == {file.name for file in tiny_base_dir.iterdir()}
        assert not any("onnx" in path for path in asked)
    manifest = read_manifest(found)
    assert manifest is not None
    assert manifest.revision == COMMIT
    assert hub_model(found) == HubModel("owner/tiny", COMMIT)
    original = load_base(resolve_base(str(tiny_base_dir), tmp_path))
    assert load_base(found).digest == original.digest

    again = download("owner/tiny", endpoint, tmp_path / "hub")  # the hub is down: the cache suffices
    assert again.commit == COMMIT


def test_a_model_the_hub_does_not_have(tiny_base_dir: Path, tmp_path: Path) -> None:
    with (
        hub_of(tiny_base_dir, []) as endpoint,
        pytest.raises(StartupError, match=r"^SMOLORA_MODEL=owner/none: .* no such model, or asks for a token$"),
    ):
        download("owner/none", endpoint, tmp_path)


def test_a_hub_that_can_not_be_reached(tmp_path: Path) -> None:
    with pytest.raises(StartupError) as refusal:
        download("owner/tiny", "http://127.0.0.1:9", tmp_path)  # the discard port
    said = str(refusal.value)
    assert said.startswith("SMOLORA_MODEL=owner/tiny: not a local directory, and the hub can't be reached (")
    assert "\n" not in said
