"""`smolora projects`: limits that a running server applies, and deleting empty projects."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from adapters.names import Viewpoint
from server.cli.main import app as commands
from server.errors import StartupError
from server.jobs.jobs import Jobs
from server.training.job_data import DataFacts
from server.training.spec import JobSpec
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.cli.home.conftest import Run, bearer, refused

PROMPT = {"prompt": "a", "max_tokens": 1}


@pytest.mark.anyio
async def test_limits_apply_at_the_next_request(client: httpx.AsyncClient, smolora: Callable[..., str]) -> None:
    keys = [bearer(smolora("keys", "create", name, "--project", "acme")) for name in ("ci", "web")]
    operator = bearer(smolora("keys", "create", "root", "--scopes", "admin"))
    assert (
        "x-ratelimit-limit-requests" not in (await client.post("/generate", json=PROMPT, headers=keys[0])).headers
    )
    output = smolora("projects", "limit", "acme", "--requests-per-minute", "1", "--max-bytes", "2GiB")
    assert output == "acme: 1 request a minute, 2GiB\n"
    answers = [(await client.post("/generate", json=PROMPT, headers=key)).status_code for key in keys]
    assert answers == [200, 429]
    listed = (await client.get("/projects", headers=operator)).json()
    assert listed.pop("next") is None
    assert json.loads(smolora("projects", "list", "--json")) == listed
    assert [project["name"] for project in listed["projects"]] == ["acme", "default"]
    assert smolora("projects", "limit", "acme") == "acme: no limits\n"
    assert (await client.post("/generate", json=PROMPT, headers=keys[1])).status_code == 200
    (entry, *_) = (await client.get("/audit", headers=operator)).json()["entries"]
    assert (entry["who"], entry["action"], entry["target"]) == ("command-line", "project.limit", "acme")


def test_limits_replace_earlier_ones(tmp_path: Path) -> None:
    home = tmp_path / "new"
    first = CliRunner().invoke(commands, ["projects", "limit", "acme", "--max-jobs", "1", "--home", str(home)])
    assert first.stdout == "acme: 1 unfinished job\n"
    assert first.stderr == f"smolora: made a home in {home}\n"
    arguments = ["--tokens-per-minute", "20000", "--max-bytes", "1000", "--home", str(home)]
    again = CliRunner().invoke(commands, ["projects", "limit", "acme", *arguments])
    assert again.stdout == "acme: 20,000 tokens a minute, 1,000 bytes\n"
    assert again.stderr == f"smolora: at work in {home}\n"
    listed = CliRunner().invoke(commands, ["projects", "list", "--home", str(home)]).stdout.splitlines()
    assert listed[0].split() == ["project", "created", "limits"]
    assert [line.split()[0] for line in listed[1:]] == ["acme"]
    assert listed[1].rstrip().endswith("20,000 tokens a minute, 1,000 bytes")


@pytest.mark.anyio
async def test_project_that_owns_something_is_not_deleted(
    client: httpx.AsyncClient, jobs: Jobs, attempt: Run, smolora: Callable[..., str]
) -> None:
    client.headers.update(bearer(smolora("keys", "create", "ci", "--project", "acme")))
    assert (await client.post("/adapters/tweets", files=as_parts(*peft_files(0)))).status_code == 201
    assert refused(attempt("projects", "delete", "acme")) == "acme has adapters: tweets; delete them first"
    rows = {"file": ("rows.jsonl", b'{"text": "a"}\n')}
    dataset = (await client.post("/datasets", files=rows)).json()["id"]
    facts = DataFacts("d" * 64, num_rows=1, num_tokens=2, num_targets=1, num_truncated=0)
    data = {**asdict(facts), "total_steps": 1}
    jobs.of(Viewpoint("acme")).submit(JobSpec("codes"), job_id="job-1", data=data)
    line = "acme has 1 data set, 1 unfinished job: delete or cancel them first"
    assert refused(attempt("projects", "delete", "acme")) == line
    assert (await client.get("/adapters")).status_code == 200  # its key is unchanged

    assert (await client.delete(f"/datasets/{dataset}")).status_code == 204
    assert (await client.delete("/adapters/tweets")).status_code == 204
    assert (await client.post("/train/job-1/cancel")).status_code == 200
    line = r"acme is deleted, and its keys are revoked; its history is kept as acme~[0-9a-f]{8}\n"
    assert re.fullmatch(line, smolora("projects", "delete", "acme"))
    assert (await client.get("/adapters")).status_code == 401
    (key,) = json.loads(smolora("keys", "list", "--json"))["keys"]
    assert key["revoked_at"] is not None


def test_invalid_options_are_refused(attempt: Run, smolora: Callable[..., str]) -> None:
    smolora("keys", "create", "ci")
    line = "there is no project acme: `smolora projects list` lists them"
    assert refused(attempt("projects", "delete", "acme")) == line
    assert refused(attempt("projects", "delete", "default")) == "the project default is always there"
    assert refused(attempt("projects", "limit", "a/b")).startswith("NAME: must be 1 to 64 letters")
    line = "--max-jobs: must be 1 or more, and below 2^53: leave it out for no limit"
    assert refused(attempt("projects", "limit", "acme", "--max-jobs", "0")) == line
    assert [project["name"] for project in json.loads(smolora("projects", "list", "--json"))["projects"]] == [
        "default"
    ]


@pytest.mark.parametrize("arguments", [["projects", "list"], ["projects", "delete", "acme"]])
def test_no_home_is_made(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(commands, [*arguments, "--home", str(tmp_path / "none")])
    assert isinstance(result.exception, StartupError)
    assert not (tmp_path / "none").exists()
