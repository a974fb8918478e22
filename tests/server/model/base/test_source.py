"""Sources of bases: each is converted once, even if a process dies or the disk is full."""

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adapters.storage.durable import UNFINISHED
from server.errors import StartupError
from server.model.base.checkpoint import open_directory
from server.model.base.convert import convert
from server.model.base.hub import Snapshot
from server.model.base.source import EMBEDDED, hub_model, is_hub_id, resolve_base
from server.model.base.weights import MANIFEST, WEIGHTS, load_base, read_manifest
from tests.kits.tiny import save_tiny_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def no_hub(model: str) -> Snapshot:
    raise AssertionError(f"asked the hub for {model}")


def directories(home: Path) -> set[str]:
    return {path.name for path in (home / "models").iterdir() if path.is_dir()}


def test_a_directory_is_converted_once(tiny_base_dir: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    first = resolve_base(str(tiny_base_dir), tmp_path, progress=messages.append, fetch=no_hub)
    assert messages == ["Converting tiny-llama"]
    assert load_base(first).name == "tiny-llama"
    assert resolve_base(str(tiny_base_dir), tmp_path, progress=messages.append) == first
    assert len(messages) == 1
    assert resolve_base(str(first), tmp_path / "elsewhere") == first  # already converted


def test_changed_directory_is_converted_again(tmp_path: Path) -> None:
    directory = save_tiny_base(tmp_path / "mine")
    first = load_base(resolve_base(str(directory), tmp_path))
    save_tiny_base(directory, seed=1)
    second = load_base(resolve_base(str(directory), tmp_path))
    assert first.name == second.name == "mine"
    assert first.digest != second.digest
    assert directories(tmp_path) == {second.directory.name}


@pytest.mark.parametrize("inside", [True, False])
def test_the_base_directory_is_looked_in_first_and_not_written_to(
    tiny_base_dir: Path, tmp_path: Path, inside: bool
) -> None:
    carried = resolve_base(str(tiny_base_dir), tmp_path / "image")
    base_dir = carried.parent if inside else carried
    before = sorted(path.stat().st_mtime_ns for path in base_dir.rglob("*"))
    home = tmp_path / "home"
    assert resolve_base(str(tiny_base_dir), home, base_dir) == carried
    assert not home.exists()
    other = save_tiny_base(tmp_path / "other", seed=3)
    assert resolve_base(str(other), home, base_dir).parent == home / "models"
    assert sorted(path.stat().st_mtime_ns for path in base_dir.rglob("*")) == before


def test_a_hub_id_is_fetched_once_and_its_commit_recorded(tiny_base_dir: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def fetch(model: str) -> Snapshot:
        asked.append(model)
        return Snapshot(tiny_base_dir, COMMIT)

    messages: list[str] = []
    found = resolve_base("owner/Tiny-Llama", tmp_path, progress=messages.append, fetch=fetch)
    assert messages == ["Fetching owner/Tiny-Llama from the hub", "Converting Tiny-Llama"]
    manifest = read_manifest(found)
    assert manifest is not None
    assert (manifest.name, manifest.origin, manifest.revision) == ("Tiny-Llama", "owner/Tiny-Llama", COMMIT)
    assert resolve_base("owner/Tiny-Llama", tmp_path, fetch=no_hub) == found
    assert asked == ["owner/Tiny-Llama"]


@pytest.mark.parametrize("model", ["no-such-name", "./missing", "/missing", "a/b/c", "../up", "owner/na me"])
def test_a_model_that_can_be_nothing(model: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"not a directory, not a GGUF file, not a hub id"):
        resolve_base(model, tmp_path, fetch=no_hub)


@pytest.mark.thorough  # the waiting process is tested below
def test_two_processes_at_once(tiny_base_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.model", "--home", str(tmp_path), "--model", str(tiny_base_dir)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    answers = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    (found,) = {answer[0].strip() for answer in answers}
    assert sum("Converting" in answer[1] for answer in answers) == 1
    assert load_base(Path(found)).config.num_layers == 3
    assert directories(tmp_path) == {Path(found).name}


def test_one_waits_while_another_converts(tiny_base_dir: Path, tmp_path: Path) -> None:
    made = resolve_base(str(tiny_base_dir), tmp_path / "other")
    models = tmp_path / "home" / "models"
    models.mkdir(parents=True)
    messages: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with (models / f".{made.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            waiting = pool.submit(resolve_base, str(tiny_base_dir), tmp_path / "home", progress=messages.append)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            shutil.copytree(made, models / made.name)
        assert waiting.result(timeout=100) == models / made.name
    assert messages == []


def test_slower_conversion_keeps_the_faster_ones_directory(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Without the lock (another machine on the same file system), the rename decides."""
    target = tmp_path / "models" / "tiny"
    convert(open_directory(tiny_base_dir), target, "tiny", "here")
    before = (target / WEIGHTS).stat().st_ino
    convert(open_directory(tiny_base_dir), target, "tiny", "here")
    assert (target / WEIGHTS).stat().st_ino == before
    assert directories(tmp_path) == {"tiny"}


def test_a_failure_midway_leaves_nothing(tiny_base_dir: Path, tmp_path: Path) -> None:
    checkpoint = open_directory(tiny_base_dir)
    last = checkpoint.tensors["model.norm.weight"]

    def fail() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    broken = {**checkpoint.tensors, "model.norm.weight": type(last)(last.shape, last.dtype, fail)}
    with pytest.raises(OSError, match="No space left"):
        convert(type(checkpoint)(checkpoint.config, {}, checkpoint.tokenizer, broken), tmp_path / "x", "x", "here")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_process_are_removed(tiny_base_dir: Path, tmp_path: Path) -> None:
    found = resolve_base(str(tiny_base_dir), tmp_path)
    left = found.parent / f"{UNFINISHED}{found.name}-abc"
    shutil.copytree(found, left)
    (found / MANIFEST).unlink()  # as if the removal of an old format had been interrupted
    assert resolve_base(str(tiny_base_dir), tmp_path) == found
    assert not left.exists()
    assert read_manifest(found) is not None


def test_older_format_is_converted_again(tiny_base_dir: Path, tmp_path: Path) -> None:
    found = resolve_base(str(tiny_base_dir), tmp_path)
    manifest = found / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
    (found / "leftover").touch()
    assert resolve_base(str(tiny_base_dir), tmp_path) == found
    assert read_manifest(found) is not None
    assert not (found / "leftover").exists()


def test_a_converted_base_keeps_its_config(tmp_path: Path) -> None:
    """A base whose config has other fields than ours is converted again."""
    directory = save_tiny_base(tmp_path / "tiny", "smollm3", {"no_rope_layers": [1, 0, 1]})
    found = resolve_base(str(directory), tmp_path)
    config = load_base(found).config
    manifest = read_manifest(found)
    assert manifest is not None
    assert manifest.config == config
    assert config.nope_layers == {1}
    kept = json.loads((found / MANIFEST).read_text())
    del kept["config"]["num_heads"]
    for fields in (kept, {key: value for key, value in kept.items() if key != "config"}):
        (found / MANIFEST).write_text(json.dumps(fields))
        assert read_manifest(found) is None
        assert resolve_base(str(directory), tmp_path) == found
        assert read_manifest(found) == manifest


def test_a_converted_base_is_served_and_trained_without_transformers(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Importing it takes as long as all other imports of a job's process, except torch."""
    resolve_base(str(tiny_base_dir), tmp_path)
    slow = [
        "accelerate",
        "alembic",
        "gguf",
        "huggingface_hub",
        "sympy",
        "torch.distributed.tensor",
        "transformers",
    ]
    code = (
        "import sys; from pathlib import Path; from server.jobs import run_job;"
        "from server.api import app; from server.serve import process, startup;"
        "from server.model.text.chat import ChatMessage, PromptEncoder;"
        f"base = run_job.load_base(run_job.resolve_base({str(tiny_base_dir)!r}, Path({str(tmp_path)!r})));"
        "PromptEncoder(base.tokenizer).messages([ChatMessage('user', 'hi')]);"
        f"print([name for name in {slow} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def full_disk(model: str) -> Snapshot:
    raise OSError(28, "No space left on device")


def read_only(model: str) -> Snapshot:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(
    ("fetch", "reason"), [(full_disk, "the disk is full"), (read_only, "Read-only file system")]
)
def test_a_home_that_can_not_be_written(tmp_path: Path, fetch: Callable[[str], Snapshot], reason: str) -> None:
    with pytest.raises(StartupError, match=rf"^SMOLORA_HOME={tmp_path}: .*: {reason}$"):
        resolve_base("owner/name", tmp_path, fetch=fetch)


def test_a_home_that_is_a_file(tiny_base_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(StartupError, match="SMOLORA_HOME="):
        resolve_base(str(tiny_base_dir), tmp_path / "home")


def test_converted_bases_are_readable_by_any_user(tiny_base_dir: Path, tmp_path: Path) -> None:
    """An image is built by root and run by another user."""
    umask = os.umask(0o077)
    try:
        found = resolve_base(str(tiny_base_dir), tmp_path)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(found.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in found.iterdir()} == {0o644}


def test_the_command_reports_a_fault_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.model", "--home", str(tmp_path), "--model", "nothing-there"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("smolora: SMOLORA_MODEL=nothing-there: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("owner/model", True),
        ("o.w-n/m_1", True),
        ("model", False),
        ("/a/b", False),
        ("./b", False),
        ("a/b/c", False),
    ],
)
def test_hub_ids(name: str, is_id: bool) -> None:
    assert is_hub_id(name) == is_id


@pytest.mark.real
def test_the_embedded_base_is_a_copy_of_a_hubs(base_dir: Path) -> None:
    found = hub_model(base_dir)
    assert found is not None
    assert found.id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "quantized" in found.note
    assert found.id.rpartition("/")[2].lower() == EMBEDDED


def test_a_directory_has_no_hub_id(converted_tiny: Path, tmp_path: Path) -> None:
    """Its path is the server's own business."""
    assert hub_model(converted_tiny) is None
    assert hub_model(tmp_path) is None
