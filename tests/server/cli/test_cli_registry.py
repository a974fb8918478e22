"""`smolora adapters`, `compose`, `datasets` and `chat` against a real server on a tiny base."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from server.cli import common
from server.cli.main import app
from tests.server.api.adapters.peft_files import as_zip, peft_files
from tests.server.running import Running, running

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base_dir: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("home"), tiny_base_dir) as server:
        yield server


@pytest.fixture
def smolora(server: Running) -> Run:
    def run(
        *arguments: str, environment: Mapping[str, str | None] | None = None, said: str | bytes = ""
    ) -> Result:
        own = {"SMOLORA_URL": server.url, "COLUMNS": "200", **(environment or {})}
        return CliRunner().invoke(app, arguments, env=own, input=said)

    return run


def publish(smolora: Run, server: Running, folder: Path, name: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        files = peft_files(seed, shape=server.services.library.shape)
        (folder / "adapter.zip").write_bytes(as_zip(*files))
        result = smolora("adapters", "import", str(folder / "adapter.zip"), "--name", name)
        assert result.exit_code == 0, result.output


def test_adapter_from_import_to_deletion(smolora: Run, server: Running, tmp_path: Path) -> None:
    publish(smolora, server, tmp_path, "life", (1, 2))
    assert smolora("adapters", "show", "life").stdout.count("life@") == 2
    version = json.loads(smolora("adapters", "show", "life@2", "--json").stdout)
    assert f"digest: {version['digest']}" in smolora("adapters", "show", "life@2").stdout

    target = tmp_path / "down.zip"
    assert smolora("adapters", "download", "life@1", "-o", str(target)).stdout == f"{target}\n"
    with zipfile.ZipFile(io.BytesIO(target.read_bytes())) as archive:
        assert "adapter_model.safetensors" in archive.namelist()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []

    assert smolora("adapters", "alias", "life", "latest", "1").stdout == "life@latest is life@1 now\n"
    assert smolora("adapters", "alias", "life", "prod", "2").exit_code == 0
    meant = json.loads(smolora("adapters", "show", "life@prod", "--json").stdout)
    assert meant == json.loads(smolora("adapters", "show", "life@2", "--json").stdout)
    assert json.loads(smolora("adapters", "show", "life@latest", "--json").stdout)["version"] == 1
    assert smolora("adapters", "download", "life@prod", "-o", str(tmp_path)).stdout == f"{tmp_path}/life-2.zip\n"
    strange = smolora("adapters", "show", "life@prd")
    assert (strange.exit_code, strange.stderr) == (
        1,
        "smolora: no such alias: life@prd (there are latest, prod)\n",
    )
    held = smolora("adapters", "delete", "life@2")
    assert held.exit_code == 1
    assert "held by the alias life@prod: --force deletes aliases with it" in held.stderr
    assert smolora("adapters", "alias", "life", "prod", "--remove").stdout == "life@prod is removed\n"
    assert smolora("adapters", "delete", "life@2").stdout == "life@2 is deleted\n"
    assert smolora("adapters", "delete", "life").exit_code == 0
    gone = smolora("adapters", "show", "life")
    assert (gone.exit_code, gone.stderr) == (1, "smolora: no such adapter: life\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("delete", "a@b"),
        ("show", "a@"),
        ("show", "a@b c"),
        ("show", "a@²"),
        ("show", f"a@{'9' * 5000}"),
        ("delete", "a@"),
        ("alias", "a", "prod"),
        ("download", "a@-x"),
    ],
)
def test_invalid_versions_are_refused_before_a_request(smolora: Run, arguments: tuple[str, ...]) -> None:
    result = smolora("adapters", *arguments, environment={"SMOLORA_URL": "http://127.0.0.1:9"})
    assert result.exit_code == 2
    assert "version" in result.stderr


def test_blend_gets_a_name(smolora: Run, server: Running, tmp_path: Path) -> None:
    publish(smolora, server, tmp_path, "left", (3,))
    publish(smolora, server, tmp_path, "right", (4,))
    assert smolora("compose", "mix", "left*0.5+right*0.25").stdout == "mix@1: left@1*0.5+right@1*0.25\n"
    held = smolora("adapters", "delete", "left")
    assert "the composition mix@1: delete the compositions first" in held.stderr
    near = smolora("generate", "a", "--adapter", "rihgt")
    assert near.stderr == "smolora: no such adapter: rihgt (did you mean right?)\n"
    queued = smolora("compose", "merged", "left+right", "--method", "ties", "--density", "0.5", "--detach")
    assert queued.stdout.startswith("job-")


def test_adapters_are_shared(smolora: Run, server: Running, tmp_path: Path) -> None:
    publish(smolora, server, tmp_path, "ours", (5,))
    assert "ours@1" not in smolora("adapters", "--public").stdout
    assert smolora("adapters", "share", "ours").stdout == "ours is public now\n"
    assert "ours@1" in smolora("adapters", "--public").stdout
    assert smolora("adapters", "share", "ours", "--stop").stdout == "ours is private now\n"
    assert "ours@1" not in smolora("adapters", "--public").stdout


def test_data_sets_are_listed_and_deleted(smolora: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "b"}\n')
    dataset_id, said = smolora("datasets", "upload", str(rows)).stdout.split(": ")
    assert said == "2 rows\n"
    assert dataset_id in smolora("datasets").stdout
    assert smolora("datasets", "delete", dataset_id).stdout == f"{dataset_id} is deleted\n"
    assert json.loads(smolora("datasets", "--json").stdout) == {"datasets": []}
    assert smolora("datasets", "upload", str(tmp_path / "nothing")).exit_code == 1


def test_conversation_keeps_earlier_turns(smolora: Run, server: Running) -> None:
    one = smolora("chat", "hello", "--max-tokens", "4", "--seed", "1")
    assert one.exit_code == 0, one.output
    before = server.services.engine.stats.prefix_cached_tokens
    two = smolora("chat", "--max-tokens", "4", "--seed", "1", said="hello\n\nand now?\n")
    assert two.exit_code == 0, two.output
    assert two.stdout.startswith(one.stdout)
    assert len(two.stdout) > len(one.stdout)
    assert server.services.engine.stats.prefix_cached_tokens > before


def test_refusal_does_not_end_a_conversation(server: Running) -> None:
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-c", "from server.cli.main import main; main()", "chat", "--max-tokens", "4"]
    environment = {**os.environ, "SMOLORA_URL": server.url}
    with open(keyboard, "wb", buffering=0) as typed, open(terminal, "rb", buffering=0) as read:
        typed.write(b"a " * 1500 + b"\n" + b"hello\n" + b"\x04")  # too long for the base; then Ctrl-D
        done = subprocess.run(command, stdin=read, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stderr.splitlines()
    assert first == "smolora: Ctrl-D ends the conversation"
    assert second.startswith("smolora: messages: ")
    assert done.stdout.count("> ") == 3, "the last one at Ctrl-D"
    assert len(done.stdout) > len("> > \n> ")


def test_stdin_in_another_encoding(smolora: Run) -> None:
    result = smolora("chat", said="schön\n".encode("latin-1"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "standard input" in result.stderr
    assert "is not in utf-8" in result.stderr


def test_address_of_openais_clients_is_explained(smolora: Run, server: Running) -> None:
    result = smolora("adapters", environment={"SMOLORA_URL": f"{server.url}/v1"})
    assert result.exit_code == 1
    assert result.stderr == (
        "smolora: 127.0.0.1 answered 404 Not Found; leave /v1 out of SMOLORA_URL or --url: it is for OpenAI's "
        "clients\n"
    )


def test_exhausted_rate_says_when_to_try_again(
    tmp_path_factory: pytest.TempPathFactory, tiny_base_dir: Path
) -> None:
    home = tmp_path_factory.mktemp("limited")
    made = CliRunner().invoke(app, ["keys", "create", "a", "--requests-per-minute", "1", "--home", str(home)])
    with running(home, tiny_base_dir) as limited:
        environment = {"SMOLORA_URL": limited.url, "SMOLORA_API_KEY": made.stdout.strip()}
        asked = ["generate", "a", "--max-tokens", "1"]
        first, second = (CliRunner().invoke(app, asked, env=environment) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 1)
    assert re.search(r"too few are left of this one; try again in \d+ s\n$", second.stderr), second.stderr


def test_default_address_is_this_machines_port(smolora: Run, server: Running) -> None:
    port = server.url.rpartition(":")[2]
    assert smolora("adapters", environment={"SMOLORA_URL": None, "SMOLORA_PORT": port}).exit_code == 0
    nobody = smolora("adapters", environment={"SMOLORA_URL": None, "SMOLORA_PORT": "9"})
    assert nobody.exit_code == 1
    assert nobody.stderr.startswith("smolora: can't reach http://127.0.0.1:9: ")
    assert "is it running?" in nobody.stderr


def test_narrow_terminal_keeps_ids_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, steps = "job-ecf323e5d9aab912", "150/150"
    output = io.StringIO()
    console = Console(file=output, width=40, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(common, "Console", lambda **options: console)
    table = common.table_of("job", "name", "status", "steps", "loss", "held out", "base's", "adapter")
    table.add_row(job_id, "codes", "succeeded", steps, "0.0012", "2.6352", "4.5973", "codes@1")
    common.show(table)
    for shown in (job_id, steps, "succeeded", "2.6352", "codes@1"):
        assert shown in output.getvalue()
