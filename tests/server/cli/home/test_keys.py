"""`smolora keys`: a key is valid on a server with the same HOME until it is revoked; secrets stay secret."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from server.access.keys import PREFIX, Keys
from server.cli.main import app as commands
from server.database import connect
from server.errors import StartupError
from server.storage.reserve import Reserve
from tests.kits.small_disk import fill, mounted
from tests.server.cli.home.conftest import Run, bearer, refused

PROMPT = {"prompt": "a", "max_tokens": 1}


def test_only_the_secret_is_on_stdout_and_it_is_not_stored(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    made = subprocess.run(
        [sys.executable, "-m", "server.cli", "keys", "create", "ci", "--home", str(home)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.fullmatch(r"sk-smolora-[\w-]{43}\n", made.stdout)
    lines = made.stderr.splitlines()
    assert lines[0] == f"smolora: made a home in {home}"
    assert re.fullmatch(
        r"smolora: key-\w{16} \(ci\) of project default may generate, train, and never expires", lines[1]
    )
    assert all(line.startswith("smolora: ") for line in lines)
    secret = made.stdout.strip()
    stored = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert any(sha256(secret.encode()).hexdigest().encode() in content for content in stored)
    for known in (secret, secret.removeprefix(PREFIX)):
        assert known not in made.stderr
        assert not any(known.encode() in content for content in stored)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_no_key_is_made_if_the_secret_cannot_be_printed(tmp_path: Path, options: list[str]) -> None:
    """On a full disk, or if the reader is gone. The server then stays open to clients without a key."""
    command = [sys.executable, "-m", "server.cli", "keys", "create", "ci", "--home", str(tmp_path), *options]
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full, open(writing, "w") as pipe:
        for stdout, reason in ((full, "No space left on device"), (pipe, "Broken pipe")):
            done = subprocess.run(
                command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False
            )
            expected = f"smolora: can't write the secret to standard output ({reason}): no key was made\n"
            assert (done.returncode, done.stderr) == (1, expected)
    listed = CliRunner().invoke(commands, ["keys", "list", "--json", "--home", str(tmp_path)])
    assert json.loads(listed.stdout) == {"keys": []}
    assert not (tmp_path / "keyed").exists()


def test_creating_a_key_imports_nothing_slow(tmp_path: Path) -> None:
    code = f"""
import sys
from server.cli.main import app
app(["keys", "create", "ci", "--home", {str(tmp_path)!r}], standalone_mode=False)
print(sorted({{"torch", "transformers", "fastapi"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[1:] == ["[]"]


@pytest.mark.anyio
async def test_key_is_valid_until_it_is_revoked(client: httpx.AsyncClient, smolora: Callable[..., str]) -> None:
    assert (await client.post("/generate", json=PROMPT)).status_code == 200  # there is no key yet
    made = json.loads(smolora("keys", "create", "ci", "--json"))
    mine = bearer(made["secret"])
    assert (await client.post("/generate", json=PROMPT)).status_code == 401
    assert (await client.post("/generate", json=PROMPT, headers=mine)).status_code == 200
    assert (await client.get("/keys", headers=mine)).status_code == 403  # it lacks the scope admin
    printed = f"{made['id']} (ci) of project default is revoked\n"
    assert smolora("keys", "revoke", made["id"]) == printed
    assert (await client.post("/generate", json=PROMPT, headers=mine)).status_code == 401
    assert (await client.post("/generate", json=PROMPT)).status_code == 401  # the server stays closed
    assert smolora("keys", "revoke", made["id"]) == printed


@pytest.mark.anyio
async def test_limits_and_project_are_stored(client: httpx.AsyncClient, smolora: Callable[..., str]) -> None:
    options = ("--project", "acme", "--requests-per-minute", "1", "--tokens-per-minute", "5000")
    mine = bearer(smolora("keys", "create", "ci", *options, "--max-jobs", "3", "--max-bytes", "1.5MiB"))
    first = await client.post("/generate", json=PROMPT, headers=mine)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "5000"
    assert (await client.post("/generate", json=PROMPT, headers=mine)).status_code == 429
    (key,) = json.loads(smolora("keys", "list", "--json"))["keys"]
    limits = {"requests_per_minute": 1, "tokens_per_minute": 5000, "max_jobs": 3, "max_bytes": 3 << 19}
    assert key | limits | {"project": "acme"} == key


@pytest.mark.anyio
async def test_lists_and_audit_equal_the_servers(client: httpx.AsyncClient, smolora: Callable[..., str]) -> None:
    operator = bearer(smolora("keys", "create", "root", "--scopes", "metrics, admin"))
    limited = json.loads(smolora("keys", "create", "ci", "--project", "acme", "--max-jobs", "1", "--json"))
    smolora("keys", "revoke", limited["id"])
    listed = (await client.get("/keys", headers=operator)).json()
    assert listed.pop("next") is None
    assert [key["scopes"] for key in listed["keys"]] == [["metrics", "admin"], ["generate", "train"]]
    assert json.loads(smolora("keys", "list", "--json")) == listed
    of_acme = json.loads(smolora("keys", "list", "--json", "--project", "acme"))["keys"]
    assert of_acme == listed["keys"][1:]
    assert limited.keys() == {*of_acme[0], "secret"}
    entries = (await client.get("/audit", headers=operator)).json()["entries"]
    assert [(entry["who"], entry["action"], entry["project"]) for entry in entries] == [
        ("command-line", "key.revoke", "acme"),
        ("command-line", "key.create", "acme"),
        ("command-line", "key.create", "default"),
    ]


def test_table_of_keys(smolora: Callable[..., str], database: sa.Engine) -> None:
    for name in ("old", "gone", "ci"):
        smolora("keys", "create", name, "--expires", "30d", "--max-bytes", "2GiB", "--requests-per-minute", "1000")
    old, gone, _ = json.loads(smolora("keys", "list", "--json"))["keys"]
    with database.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE api_keys SET created_at = '2020-01-01 00:00', expires_at = '2020-01-31 12:34',"
            f" last_used_at = '2020-01-30 23:59' WHERE id = '{old['id']}'"
        )
    smolora("keys", "revoke", gone["id"])
    titles, *rows = [re.split(r"\s{2,}", line.strip()) for line in smolora("keys", "list").splitlines()]
    assert titles == ["key", "name", "project", "scopes", "created", "expires", "last used", "state", "limits"]
    limits = "1,000 requests a minute, 2GiB"
    times = ["2020-01-01 00:00Z", "2020-01-31 12:34Z", "2020-01-30 23:59Z"]
    assert rows[0] == [old["id"], "old", "default", "generate, train", *times, "expired", limits]
    assert [(row[1], row[-2]) for row in rows] == [("old", "expired"), ("gone", "revoked"), ("ci", "valid")]


def test_first_key_is_announced(attempt: Run) -> None:
    printed = [attempt("keys", "create", name).stderr for name in ("a", "b")]
    assert ["it is the first" in line for line in printed] == [True, False]


@pytest.mark.parametrize(
    ("text", "span"),
    [("90d", timedelta(days=90)), ("12h", timedelta(hours=12)), ("30m", timedelta(minutes=30))],
)
def test_expiry_as_a_span(smolora: Callable[..., str], text: str, span: timedelta) -> None:
    key = json.loads(smolora("keys", "create", "ci", "--expires", text, "--json"))
    at = datetime.fromisoformat(key["expires_at"])
    assert timedelta(0) <= datetime.now(UTC) + span - at < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2999-01-31", "2999-01-31T00:00:00+00:00"),
        ("2999-01-31T12:00", "2999-01-31T12:00:00+00:00"),
        ("2999-01-31T12:00Z", "2999-01-31T12:00:00+00:00"),
        ("2999-01-31T12:00+05:30", "2999-01-31T06:30:00+00:00"),
    ],
)
def test_expiry_as_a_time(smolora: Callable[..., str], text: str, at: str) -> None:
    assert json.loads(smolora("keys", "create", "ci", "--expires", text, "--json"))["expires_at"] == at


NAME_RULE = 'must be 1 to 64 letters, digits, "_", "-" or ".", the first a letter or digit'
SPAN_RULE = "must be a span, such as 90d, 12h or 30m, or a date or time, such as 2027-01-31 or 2027-01-31T12:00Z"
LIMIT_RULE = "must be 1 or more, and below 2^53: leave it out for no limit"
SIZE_RULE = "must be a size, such as 2GiB, or a number of bytes"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a/b"], f"NAME: {NAME_RULE}"),
        (["a", "--project", ""], f"--project: {NAME_RULE}"),
        (
            ["a", "--scopes", "generate,all"],
            "--scopes: must be one or more of generate, train, metrics, manage, admin",
        ),
        (
            ["a", "--scopes", "admin", "--project", "acme"],
            "--scopes: admin is for keys of the project default alone; give manage to administer one project",
        ),
        (["a", "--scopes", ""], "--scopes: must be one or more of generate, train, metrics, manage, admin"),
        (["a", "--expires", "0d"], "--expires: must be in the future"),
        (["a", "--expires", "2020-01-01"], "--expires: must be in the future"),
        (["a", "--expires", "soon"], f"--expires: {SPAN_RULE}"),
        (["a", "--expires", "-5d"], f"--expires: {SPAN_RULE}"),
        (["a", "--expires", "999999999d"], f"--expires: {SPAN_RULE}"),
        (["a", "--expires", "9999-12-31T23:59-05:00"], f"--expires: {SPAN_RULE}"),
        (["a", "--requests-per-minute", "0"], f"--requests-per-minute: {LIMIT_RULE}"),
        (["a", "--tokens-per-minute", "-1"], f"--tokens-per-minute: {LIMIT_RULE}"),
        (["a", "--max-jobs", str(1 << 53)], f"--max-jobs: {LIMIT_RULE}"),
        (["a", "--max-bytes", "0"], f"--max-bytes: {LIMIT_RULE}"),
        (["a", "--max-bytes", "lots"], f"--max-bytes: {SIZE_RULE}"),
        (["a", "--max-bytes", f"{'9' * 400}TiB"], f"--max-bytes: {SIZE_RULE}"),
        (["a b", "--expires", "0d"], f"NAME: {NAME_RULE}; --expires: must be in the future"),
    ],
)
def test_invalid_options_are_refused(
    attempt: Run, smolora: Callable[..., str], arguments: list[str], line: str
) -> None:
    smolora("keys", "create", "first")
    assert refused(attempt("keys", "create", *arguments)) == line
    assert [key["name"] for key in json.loads(smolora("keys", "list", "--json"))["keys"]] == ["first"]


def test_unknown_keys_are_refused(attempt: Run, smolora: Callable[..., str]) -> None:
    smolora("keys", "create", "ci")
    line = "there is no key key-0: `smolora keys list` lists them"
    assert refused(attempt("keys", "revoke", "key-0")) == line


@pytest.mark.parametrize("arguments", [["keys", "list"], ["keys", "revoke", "key-0"]])
def test_no_home_is_made(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(commands, [*arguments, "--home", str(tmp_path / "none")])
    assert isinstance(result.exception, StartupError)
    assert "isn't a server's home" in str(result.exception)
    assert not (tmp_path / "none").exists()


def test_full_disk_allows_revoking_only(tmp_path: Path) -> None:
    """While a server has the database open."""
    with mounted(tmp_path, 4):
        engine = connect(tmp_path)
        key, _ = Keys(engine, tmp_path / "keyed").create("ci", who="test")
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        assert Reserve(tmp_path).fill()
        fill(tmp_path)
        for command in (["keys", "create", "laptop"], ["projects", "limit", "acme"]):
            done = CliRunner().invoke(commands, [*command, "--home", str(tmp_path)])
            assert isinstance(done.exception, StartupError)
            assert str(done.exception) == "the database: the disk is full"
        done = CliRunner().invoke(commands, ["keys", "revoke", key.id, "--home", str(tmp_path)])
        assert done.exit_code == 0, done.output
        (found,) = Keys(engine, tmp_path / "keyed").list()
        assert found.revoked_at is not None
        engine.dispose()
