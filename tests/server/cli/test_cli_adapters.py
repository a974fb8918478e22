"""`smolora adapters import` from a folder and from a zip, against a real server on a tiny base."""

import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load
from typer.testing import CliRunner, Result

from server.cli.main import app
from server.client.client import Client
from tests.server.api.adapters.peft_files import as_zip, peft_files
from tests.server.running import Running, running

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base_dir: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("home"), tiny_base_dir) as server:
        yield server


@pytest.fixture
def smolora(server: Running) -> Run:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments, env={"SMOLORA_URL": server.url, "COLUMNS": "200"})

    return run


@pytest.fixture
def files(server: Running) -> tuple[bytes, bytes]:
    return peft_files(3, shape=server.services.library.shape, base_model="someone/else")


def test_folder_and_zip_come_back_byte_for_byte(
    smolora: Run, server: Running, files: tuple[bytes, bytes], tmp_path: Path
) -> None:
    config, weights = files
    (tmp_path / "adapter_config.json").write_bytes(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    (tmp_path / "README.md").write_text("# no business of ours")
    result = smolora("adapters", "import", str(tmp_path), "--name", "up")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("up@1: rank 2, digest ")
    assert "someone/else" in result.stderr  # the warning

    content = httpx.get(f"{server.url}/adapters/up/1/download", trust_env=False).content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("adapter_config.json") == config
        stored, sent = load(archive.read("adapter_model.safetensors")), load(weights)
    assert all(stored[name].numpy().tobytes() == sent[name].numpy().tobytes() for name in sent)

    for number, packed in ((2, content), (3, as_zip(config, weights))):
        (tmp_path / "adapter.zip").write_bytes(packed)
        result = smolora("adapters", "import", str(tmp_path / "adapter.zip"), "--name", "up", "--json")
        version = json.loads(result.stdout)
        assert (version["version"], version["digest"]) == (number, version["digest"])
    listed = json.loads(smolora("adapters", "--json").stdout)["adapters"]
    assert len({version["digest"] for version in listed[0]["versions"]}) == 1
    assert len(list((server.services.settings.home / "adapters").glob("??/*"))) == 1

    composed = httpx.post(f"{server.url}/compositions/mix", json={"expression": "up@1*0.5"}, trust_env=False)
    assert composed.status_code == 201
    shown = smolora("adapters").stdout
    assert "mix@1" in shown
    assert "up@1*0.5" in shown


def test_adapters_of_other_projects(
    smolora: Run, server: Running, files: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named as in lists. An unknown one is never taken for the own project's."""
    for name, headers in (("tone", {}), ("acme", {}), ("tone", {"OpenAI-Project": "acme"})):
        if headers:
            home = str(server.services.settings.home)
            assert smolora("projects", "limit", "acme", "--max-jobs", "3", "--home", home).exit_code == 0
        parts = {"archive": as_zip(*files)}
        sent = httpx.post(f"{server.url}/adapters/{name}", files=parts, headers=headers, trust_env=False)
        assert sent.status_code == 201, sent.text
    assert "acme/tone@1" in smolora("adapters").stdout
    assert smolora("adapters", "show", "acme/tone").stdout.count("acme/tone@1") == 1
    assert "name: acme/tone\n" in smolora("adapters", "show", "acme/tone@1").stdout
    assert smolora("adapters", "alias", "acme/tone", "prod", "1").stdout == "acme/tone@prod is acme/tone@1 now\n"
    assert smolora("adapters", "alias", "acme/tone", "prod", "--remove").exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert smolora("adapters", "download", "acme/tone").stdout == "acme-tone-1.zip\n"
    assert smolora("adapters", "delete", "acme/tone").stdout == "acme/tone is deleted\n"
    for gone in ("acme/tone", "acme/1", "nobody/tone", "acme/tone@1"):
        result = smolora("adapters", "delete", gone)
        assert (result.exit_code, result.stderr) == (1, f"smolora: no such adapter: {gone.partition('@')[0]}\n")
    listed = [adapter["name"] for adapter in json.loads(smolora("adapters", "--json").stdout)["adapters"]]
    assert {"acme", "tone"} <= set(listed)


def test_failed_imports_are_one_line(smolora: Run, files: tuple[bytes, bytes], tmp_path: Path) -> None:
    config, _ = files
    (tmp_path / "adapter_config.json").write_bytes(config)
    missing = smolora("adapters", "import", str(tmp_path), "--name", "x")
    assert missing.exit_code == 1
    assert "adapter_model.safetensors: No such file" in missing.stderr
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    broken = smolora("adapters", "import", str(tmp_path), "--name", "x")
    assert broken.exit_code == 1
    assert broken.stderr.startswith("smolora: adapter_model")
    nowhere = smolora("adapters", "import", "owner/tweets", "--name", "x")
    assert nowhere.exit_code == 2
    assert "--hub" in nowhere.stderr
    refused = smolora("adapters", "import", "owner/tweets", "--name", "x", "--hub")
    assert refused.exit_code == 1
    assert "SMOLORA_ALLOW_HUB_ADAPTERS" in refused.stderr


def test_folder_of_adapters_and_pickled_weights_are_explained(
    smolora: Run, files: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """Trainers leave folders of checkpoints, and older PEFT saved pickles."""
    for folder in ("checkpoint-100", "checkpoint-200"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_bytes(files[0])
    above = smolora("adapters", "import", str(tmp_path), "--name", "x")
    assert above.exit_code == 1
    assert above.stderr.endswith("give one of checkpoint-100, checkpoint-200\n")
    (tmp_path / "checkpoint-100" / "adapter_model.bin").write_bytes(b"PK\3\4 pickled tensors")
    pickled = smolora("adapters", "import", str(tmp_path / "checkpoint-100"), "--name", "x")
    assert pickled.exit_code == 1
    assert "safe_serialization=True" in pickled.stderr


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_without_config_is_no_folder_of_adapters(
    smolora: Run, files: tuple[bytes, bytes], tmp_path: Path, weights: str
) -> None:
    """Trainers save the last weights next to the checkpoints; suggesting those would publish an older adapter."""
    (tmp_path / "checkpoint-100").mkdir()
    (tmp_path / "checkpoint-100" / "adapter_config.json").write_bytes(files[0])
    (tmp_path / weights).write_bytes(files[1])
    result = smolora("adapters", "import", str(tmp_path), "--name", "x")
    assert result.exit_code == 1
    assert result.stderr.endswith("adapter_config.json: No such file or directory\n")


def test_download_into_a_folder(
    smolora: Run, server: Running, files: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through a link, which stays."""
    uploaded = httpx.post(f"{server.url}/adapters/down", files={"archive": as_zip(*files)}, trust_env=False)
    assert uploaded.status_code == 201, uploaded.text
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    result = smolora("adapters", "download", "down", "--output", str(link))
    assert (result.exit_code, result.stdout) == (0, f"{link / 'down-1.zip'}\n")
    assert link.is_symlink()
    assert zipfile.is_zipfile(folder / "down-1.zip")
    monkeypatch.chdir(tmp_path)
    assert smolora("adapters", "download", "down", "--output", ".").stdout == "down-1.zip\n"
    assert zipfile.is_zipfile("down-1.zip")


def test_download_replaces_neither_pipes_nor_links(
    smolora: Run, server: Running, files: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """As root, `--output /dev/null` once replaced the device."""
    uploaded = httpx.post(f"{server.url}/adapters/piped", files={"archive": as_zip(*files)}, trust_env=False)
    assert uploaded.status_code == 201, uploaded.text
    pipe, file, link = tmp_path / "pipe", tmp_path / "file.zip", tmp_path / "link.zip"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    result = smolora("adapters", "download", "piped", "--output", str(pipe))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"{pipe}\n")
    assert pipe.is_fifo()
    assert zipfile.is_zipfile(io.BytesIO(os.read(reader, 1 << 16)))
    os.close(reader)
    link.symlink_to(file)
    for _ in range(2):
        assert smolora("adapters", "download", "piped", "--output", str(link)).exit_code == 0
        assert link.is_symlink()
        assert zipfile.is_zipfile(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.zip", "link.zip", "pipe"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    circle = smolora("adapters", "download", "piped", "--output", str(tmp_path / "circle"))
    assert circle.exit_code == 1
    assert "Too many levels of symbolic links" in circle.stderr
    assert (tmp_path / "circle").is_symlink()


@pytest.mark.parametrize("is_file", [True, False])
def test_download_to_stdout_is_only_the_archive(
    server: Running, files: tuple[bytes, bytes], is_file: bool, tmp_path: Path
) -> None:
    """The name was once printed after the archive, or over its start if stdout is a file."""
    uploaded = httpx.post(f"{server.url}/adapters/out", files={"archive": as_zip(*files)}, trust_env=False)
    assert uploaded.status_code == 201, uploaded.text
    url = f"{server.url}/adapters/out/{uploaded.json()['version']}/download"
    arguments = ["adapters", "download", "out", "--output", "/dev/stdout", "--url", server.url]
    with (tmp_path / "out.zip").open("w+b") as file:
        command = [sys.executable, "-m", "server.cli", *arguments]
        done = subprocess.run(command, stdout=file if is_file else subprocess.PIPE, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"/dev/stdout\n")
        assert (file.read() if is_file else done.stdout) == httpx.get(url, trust_env=False).content


def test_download_follows_only_links_that_the_kernel_follows(
    server: Running, files: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as links of other users in /tmp: only the kernel decides."""
    uploaded = httpx.post(f"{server.url}/adapters/led", files={"archive": as_zip(*files)}, trust_env=False)
    assert uploaded.status_code == 201, uploaded.text
    mine, link = tmp_path / "mine.zip", tmp_path / "link.zip"
    mine.write_text("dear to me")
    link.symlink_to(mine)
    opened = Path.open

    def protected(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == link:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", protected)
    with pytest.raises(PermissionError), Client(server.url) as client:
        client.download("led", 1, link)
    assert mine.read_text() == "dear to me"
