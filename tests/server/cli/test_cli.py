"""The `smolora` script: one line if it can't start, and quick help."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_group
from typer.testing import CliRunner

from server.cli.common import Commands
from server.cli.main import app


def smolora(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from server.cli.main import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--dtype", "int8"], "SMOLORA_DTYPE (--dtype): "),
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from elsewhere: make a key ("),
        (["--home", "/dev/null/x"], "SMOLORA_HOME=/dev/null/x: can't write there: "),
        (["--port", "0", "--host", "192.0.2.1", "--api-keys", "k" * 16], "can't listen on 192.0.2.1, port 0: "),
    ],
)
def test_reason_for_not_starting_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    result = smolora("serve", "--home", str(tmp_path), *arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"smolora: {line}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "lost", ["a full disk", pytest.param("a pipe that nobody reads", marks=pytest.mark.thorough)]
)
def test_server_starts_if_its_output_is_lost(tmp_path: Path, tiny_base_dir: Path, lost: str) -> None:
    if lost == "a full disk":
        said = os.open("/dev/full", os.O_WRONLY)
    else:
        unread, said = os.pipe()
        os.close(unread)
    arguments = (f"--home={tmp_path}", f"--model={tiny_base_dir}", "--port=0", "--workers=0", "--no-native")
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # otherwise nothing is left to write at exit
    command = [sys.executable, "-m", "server.cli", "serve", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=environment, text=True)
    os.close(said)
    with server:
        try:
            assert server.stdout is not None
            assert "is ready at" in server.stdout.readline()
        finally:
            server.terminate()
    assert server.returncode == 0


@pytest.mark.parametrize(
    "fault",
    [
        'RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can\'t allocate memory")',
        pytest.param(
            "RuntimeError('unable to mmap 8 bytes from file <a.safetensors>: Cannot allocate memory (12)')",
            marks=pytest.mark.thorough,
        ),
        pytest.param("OSError(12, 'Cannot allocate memory')", marks=pytest.mark.thorough),
        pytest.param("MemoryError", marks=pytest.mark.thorough),
    ],
)
def test_too_little_memory_is_one_line(tmp_path: Path, fault: str) -> None:
    """As under `ulimit -v`, wherever memory runs out."""
    code = (
        "from server.cli.main import main; from server.serve import startup\n"
        f"def build(*_, **__): raise {fault}\n"
        "startup.build = build; main()"
    )
    command = [sys.executable, "-c", code, "serve", f"--home={tmp_path}", "--port=0"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert last.startswith(
        "smolora: no memory for smollm2-135m-instruct: raise the limit of this shell (ulimit -v)"
    )


@pytest.mark.parametrize("command", [("serve", "--port=0"), ("worker",)])
def test_reason_is_json_if_the_log_is(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Readers of the JSON log must see why it ends."""
    (tmp_path / "smolora.db").mkdir()
    done = smolora(*command, "--home", str(tmp_path), "--log-format", "json")
    assert done.returncode == 1
    *_, last = [json.loads(line) for line in done.stderr.splitlines()]
    assert (last["level"], last["logger"]) == ("CRITICAL", "smolora.run")
    assert "smolora.db" in last["message"]


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize("place", ["flag", "variable"])
def test_invalid_setting_is_json_if_the_log_is(command: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--log-format=json"] if place == "flag" else []
    if place == "variable":
        monkeypatch.setenv("SMOLORA_LOG_FORMAT", "json")
    monkeypatch.setenv("SMOLORA_TRAIN_SHARE", "much")
    done = smolora(command, "--home", "/dev/null/x", *flags)
    assert done.returncode == 1
    assert json.loads(done.stderr)["message"] == "SMOLORA_TRAIN_SHARE (--train-share): must be a number"


def test_worker_names_unknown_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLORA_TRAIN_SHARES", "0.5")
    expected = "SMOLORA_TRAIN_SHARES is not a setting: did you mean SMOLORA_TRAIN_SHARE?"
    assert expected in smolora("worker", "--home", "/dev/null/x").stderr


@pytest.mark.parametrize(
    ("arguments", "seen", "key"),
    [
        (["serve", "--api-keys=k1,k2", "--port", "1"], ["serve", "--port", "1"], "k1,k2"),
        (["serve", "--api-keys", "k1", "--port=1"], ["serve", "--port=1"], "k1"),
        (["serve", "--api-keys", "", "x"], ["serve", "x"], ""),
        (["serve", "--api-keys"], ["serve", "--api-keys"], "from outside"),  # refused later on
        (["serve", "--port", "1"], ["serve", "--port", "1"], "from outside"),
        (["serve", "--", "--api-keys=k1"], ["serve", "--", "--api-keys=k1"], "from outside"),
    ],
)
def test_keys_are_hidden_in_the_command_line(arguments: list[str], seen: list[str], key: str) -> None:
    code = """
import json, os, sys
from server.config.environment import hide_keys
hide_keys()
with open("/proc/self/cmdline") as file:
    print(json.dumps([os.getpid(), os.environ["SMOLORA_API_KEYS"], file.read().split("\\0")[3:-1]]))
"""
    command = [sys.executable, "-c", code, *arguments]
    environment = os.environ | {"SMOLORA_API_KEYS": "from outside"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate(timeout=60)
    assert json.loads(output) == [process.pid, key, seen]


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--api-key", "k"),
        ("serve", "--api-key=k"),
        ("--api-key", "k", "serve"),
        ("--api-keys=k", "serve"),
        ("worker", "--api-key", "k"),
        ("jobs", "--api-keys=k"),
    ],
)
def test_key_in_the_wrong_flag_is_refused(arguments: tuple[str, ...]) -> None:
    """vLLM's server has this flag for its keys. Taken for a client's key, it would leave the server open."""
    result = smolora(*arguments, *(["--home", "/dev/null/x"] if "serve" in arguments else []))
    assert result.returncode == 2
    assert "No such option" in result.stderr


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--lora_r", "No such option: --lora_r (did you mean --rank?)"),
        ("--lora-alpha=8", "No such option: --lora-alpha (did you mean --alpha?)"),
        (
            "--per_device_train_batch_size",
            "No such option: --per_device_train_batch_size (did you mean --batch-size?) It is all rows of an "
            "optimizer step, accumulated ones too.",
        ),
        ("--early_stopping_patience", "No such option: --early_stopping_patience (did you mean --patience?)"),
        ("--use_dora", "No such option: --use_dora"),  # it must not suggest --rslora
        ("--rnk", "No such option: --rnk (Possible options: --rank, --url)"),  # Typer's own message
    ],
)
def test_options_of_peft_and_trl_get_a_suggestion(option: str, expected: str) -> None:
    result = CliRunner().invoke(app, ["train", "rows.jsonl", "--name", "a", option, "3"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"│ {expected} " in result.stderr
    assert ("(" in result.stderr) == ("(" in expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("run", "No such command 'run'. Did you mean 'chat'?"),
        ("ls", "No such command 'ls'. Did you mean 'adapters'?"),
        ("ps", "No such command 'ps'. Did you mean 'jobs'?"),
        ("create", "No such command 'create'. Did you mean 'train'?"),
        ("compar", "No such command 'compar'. Did you mean 'compare'?"),
        ("prun", "No such command 'prun'."),
        ("restor", "No such command 'restor'."),
        ("keys ls", "No such command 'ls'."),
        ("keys revok", "No such command 'revok'."),
        ("adapters delet", "No such command 'delet'."),
        ("adapters downlod", "No such command 'downlod'. Did you mean 'download'?"),
        ("datasets rm", "No such command 'rm'."),
        ("projects delte", "No such command 'delte'."),
        ("cluster deplo", "No such command 'deplo'. Did you mean 'deploy'?"),
        ("cluster dow", "No such command 'dow'."),
    ],
)
def test_unknown_commands_never_suggest_a_destructive_one(words: str, expected: str) -> None:
    assert refused_command(*words.split()) == expected


def test_no_group_suggests_a_destructive_command() -> None:
    found = set()
    groups: list[tuple[list[str], TyperGroup]] = [([], get_group(app))]
    for words, group in groups:
        for name, command in group.commands.items():
            if isinstance(command, TyperGroup):
                groups.append(([*words, name], command))
            if name in DESTRUCTIVE:
                found.add(name)
                assert f"Did you mean '{name}'?" not in refused_command(*words, name[:-1]), words
        assert isinstance(group, Commands), words
    assert found == DESTRUCTIVE


DESTRUCTIVE = {"delete", "down", "move", "prune", "restart", "restore", "revoke"}


def refused_command(*words: str) -> str:
    """Return the error for an unknown command."""
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    (line,) = [line.strip("│ ") for line in result.stderr.splitlines() if "No such command" in line]
    return line


@pytest.mark.parametrize(
    "command", [("worker",), ("keys", "create", "a"), ("projects", "limit", "a", "--max-jobs", "1")]
)
@pytest.mark.parametrize("is_there", [False, True])
def test_commands_do_not_make_the_default_home(
    command: tuple[str, ...], is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the wrong folder, a key would protect nothing, and a worker would wait forever."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SMOLORA_HOME", raising=False)
    if is_there:  # a folder of something else
        (tmp_path / "data").mkdir()
    done = smolora(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"smolora: {tmp_path}/data isn't a server's home: it has no smolora.db; give --home or SMOLORA_HOME\n"
    )
    assert list(tmp_path.rglob("*")) == ([tmp_path / "data"] if is_there else [])


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_home_that_is_named_is_made(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before the first start of a server that other machines reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOLORA_HOME", "data") if how == "variable" else monkeypatch.delenv("SMOLORA_HOME", False)
    done = smolora("keys", "create", "a", *(["--home", "data"] if how == "flag" else []))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"smolora: made a home in {tmp_path}/data\n")


def test_values_that_look_like_options() -> None:
    """They are taken for a file, which doesn't exist."""
    arguments = ["train", "--name", "a", "--description", "--lr", "--", "--lr"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "--lr: No such file or directory" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["train", "rows.jsonl", "--name", "a", "--learning-rate", "nan"], "--learning-rate"),
        (["generate", "a", "--temperature", "inf"], "--temperature"),
        (["chat", "a", "--top-p=-inf"], "--top-p"),
        (["train", "rows.jsonl", "--name", "a", "--validation", "nan"], "--validation"),  # before rows are sent
    ],
)
def test_nan_and_infinity_are_refused(arguments: list[str], option: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"Invalid value for {option}: it must be finite" in result.stderr


def test_help_imports_nothing_slow() -> None:
    slow = {"torch", "transformers", "fastapi", "sqlalchemy"}
    code = f"import sys, server.cli.main; print(sorted({slow} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"
    assert "serve" in smolora("--help").stdout
    assert "--max-num-seqs" in smolora("serve", "--help").stdout.replace("\n", "")
    assert smolora("--version").stdout == "0.1.0\n"
