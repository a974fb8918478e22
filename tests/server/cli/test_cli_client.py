"""The commands that speak to a server, against a real one on a tiny base, with a fake worker."""

import json
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from server.cli.main import app
from server.database import connect
from server.jobs.leases import Leases
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import StandIn
from tests.server.running import Running, running

ROWS = [{"prompt": f"{status.value} ", "completion": status.phrase} for status in list(HTTPStatus)[:20]]

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base_dir: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("home"), tiny_base_dir, api_keys="secret-0123456789") as server:
        files = as_parts(*peft_files(shape=server.services.library.shape))
        headers = {"Authorization": "Bearer secret-0123456789"}
        response = httpx.post(f"{server.url}/adapters/up", files=files, headers=headers, trust_env=False)
        assert response.status_code == 201, response.text
        yield server


@pytest.fixture
def smolora(server: Running) -> Run:
    """Return a function that runs a command with the server's address and key in the environment."""

    def run(*arguments: str, environment: Mapping[str, str] | None = None) -> Result:
        own = {"SMOLORA_URL": server.url, "SMOLORA_API_KEY": "secret-0123456789", "COLUMNS": "200"}
        return CliRunner().invoke(app, arguments, env={**own, **(environment or {})})

    return run


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return str(path)


@pytest.fixture
def worker(server: Running) -> Iterator[Callable[[Callable[[StandIn], object]], None]]:
    """Return a function that runs the next job with `work` in a thread."""
    leases = Leases(connect(server.services.settings.home))
    threads = []

    def start(work: Callable[[StandIn], object]) -> None:
        def run() -> None:
            deadline = time.monotonic() + 30
            while (claim := leases.claim("stand-in")) is None:
                assert time.monotonic() < deadline, "no job was submitted"
                time.sleep(0.01)
            work(StandIn(leases, claim))

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(30)


def test_generate_prints_the_text(smolora: Run) -> None:
    options = ("--max-tokens", "8", "--temperature", "0")
    plain = smolora("generate", "404 Not", *options)
    assert plain.exit_code == 0, plain.output
    answer = json.loads(smolora("generate", "404 Not", *options, "--json").stdout)
    assert plain.stdout == f"{answer['choices'][0]['text']}\n"
    tuned = json.loads(smolora("generate", "404 Not", *options, "-a", "up*3", "--json").stdout)
    assert tuned["adapters"][0] | {"digest": ""} == {"name": "up", "version": 1, "digest": "", "weight": 3.0}
    assert tuned["choices"] != answer["choices"]
    chat = json.loads(smolora("generate", "404 Not", *options, "--chat", "--stop", "x", "--json").stdout)
    assert chat["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"]
    shown = json.loads(smolora("generate", "404 Not", *options, "--system", "Be brief.", "--json").stdout)
    assert shown["usage"]["prompt_tokens"] != chat["usage"]["prompt_tokens"]


def test_continued_question_suggests_chat(smolora: Run) -> None:
    options = ("--max-tokens", "2", "--temperature", "0")
    question = "What's LoRA?"
    result = smolora("generate", question, *options)
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("smolora: generate only continues a text; to have it answered: ")
    program, *arguments = shlex.split(line.rpartition("answered: ")[2])
    assert Path(program).name == "smolora"
    assert arguments == ["chat", question]
    assert smolora(*arguments, "--max-tokens", "2").exit_code == 0
    answer = json.loads(smolora("generate", question, *options, "--json").stdout)
    assert result.stdout == f"{answer['choices'][0]['text']}\n"
    for other in ((question, "--chat"), (question, "-a", "up"), (question, "--json"), ("404 Not",)):
        assert smolora("generate", *other, *options).stderr == ""


def test_adapter_of_another_base_is_a_warning(smolora: Run, server: Running) -> None:
    files = as_parts(*peft_files(seed=1, base_model="someone/else", shape=server.services.library.shape))
    headers = {"Authorization": "Bearer secret-0123456789"}
    httpx.post(f"{server.url}/adapters/stray", files=files, headers=headers, trust_env=False).raise_for_status()
    compare = ("compare", "404", "-a", "base", "-a", "stray", "-a", "stray*0.5", "--max-tokens", "1")
    for command in (("generate", "404", "-a", "stray", "--max-tokens", "1"), compare):
        result = smolora(*command)
        assert result.exit_code == 0, result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith("smolora: stray@1: ")
        assert "someone/else" in line
        assert "someone/else" not in result.stdout
    assert smolora("generate", "404", "-a", "up", "--max-tokens", "1").stderr == ""


def test_adapters_are_listed(smolora: Run) -> None:
    listed = json.loads(smolora("adapters", "--json").stdout)["adapters"]
    assert "up" in [adapter["name"] for adapter in listed]
    result = smolora("adapters")
    assert result.exit_code == 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("up@1")]
    assert "latest" in line
    assert "q, v, up" in line


def job_of(smolora: Run) -> str:
    """Return the newest job's id."""
    return str(json.loads(smolora("jobs", "--json", "--limit", "1").stdout)["jobs"][0]["id"])


def test_train_until_the_job_ends(
    smolora: Run, server: Running, worker: Callable[[Callable[[StandIn], object]], None], rows: str
) -> None:
    def work(stand_in: StandIn) -> None:
        for step in range(1, 4):
            stand_in.step(step, 3.0 / step)
        stand_in.succeed(digest="1" * 64)

    worker(work)
    result = smolora("train", rows, "--name", "codes", "--rank", "8", "--epochs", "2")
    assert result.exit_code == 0, result.output
    for news in (
        "16 rows to train on, 4 held out",
        "queued",
        "started",
        "succeeded: codes@1",
        "9/9",
        "loss 0.500 ",
        "held out 0.750 ",
        "base 3.000 ",
    ):
        assert news in result.stdout
    assert "held-out loss 0.7500, the untouched base's 3.0000" in result.stdout
    (suggested,) = [line.removeprefix("Try: ") for line in result.stdout.splitlines() if line.startswith("Try: ")]
    program, *arguments = shlex.split(suggested)
    assert Path(program).name == "smolora"
    assert arguments == ["generate", "…", "--adapter", "codes@1"]
    elsewhere = smolora("jobs", "--url", server.url, "--follow", job_of(smolora), environment={"SMOLORA_URL": ""})
    assert elsewhere.stdout.rstrip().endswith(f"--adapter codes@1 --url {server.url}")
    job = json.loads(smolora("jobs", "--json", "--limit", "1").stdout)["jobs"][0]
    assert (job["config"]["lora"]["rank"], job["config"]["training"]["epochs"]) == (8, 2)
    assert (job["data"]["rows"], job["data"]["validation_rows"]) == (16, 4)
    assert "codes@1" in smolora("adapters").stdout
    line = smolora("jobs", job["id"]).stdout.splitlines()[1]
    settings, losses = ["8", "0.001"], ["0.5000", "0.7500", "3.0000"]
    assert line.split() == [job["id"], "codes", "succeeded", "9/9", *settings, *losses, "codes@1"]


def test_chats_are_tried_in_a_chat(
    smolora: Run, worker: Callable[[Callable[[StandIn], object]], None], tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "404?"}, {"role": "assistant", "content": "Not Found"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, ({"messages": turns}, {"messages": turns[:2] * 2}, ROWS[0]))))
    worker(lambda stand_in: stand_in.succeed(digest="2" * 64))
    result = smolora("train", str(path), "--name", "codes")
    assert result.exit_code == 0, result.output
    assert "chat … --adapter codes@" in result.stdout.splitlines()[-1].replace("'", "")


def test_decisions_are_tried_by_decide(
    smolora: Run, worker: Callable[[Callable[[StandIn], object]], None], tmp_path: Path
) -> None:
    path = tmp_path / "tickets.csv"
    path.write_text("body,team\nno invoice,billing\nno parcel,shipping\n")
    worker(lambda stand_in: stand_in.succeed(digest="2" * 64))
    result = smolora("train", str(path), "--name", "codes", "--text", "body", "--label", "team")
    assert result.exit_code == 0, result.output
    assert "decide … --adapter codes@" in result.stdout.splitlines()[-1].replace("'", "")


@pytest.mark.parametrize("command", [("train", "--name", "triage"), ("evaluate", "-a", "base")])
def test_a_table_of_labels_needs_two_options(smolora: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    path = tmp_path / "tickets.csv"
    path.write_text("body,team,id\nno invoice,billing,1\n")
    result = smolora(*command, str(path))
    assert result.exit_code == 1
    assert "body, team, id" in result.stderr
    advice = "to train on labels instead, give --text and --label: the columns of the texts and of their labels"
    assert result.stderr.splitlines()[-1] == f"smolora: {advice}"


def test_adapters_are_listed_without_losses(smolora: Run, server: Running) -> None:
    """Versions may have been measured on different rows, so their losses don't compare."""
    metrics = {"eval_loss": 1.5, "base_eval_loss": 3.0, "recall": 0.96}
    server.services.library.catalog.publish(
        "recalled",
        digest="3" * 64,
        rank=2,
        alpha=4.0,
        target_modules=["q_proj"],
        parameters=1,
        bytes=1,
        metrics=metrics,
    )
    shown = smolora("adapters").stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("recalled@1")]
    assert "96.0%" in line
    assert "1.5" not in line
    assert "eval_loss" in smolora("adapters", "show", "recalled@1").stdout


def test_early_stop_is_reported(
    smolora: Run, worker: Callable[[Callable[[StandIn], object]], None], rows: str
) -> None:
    report: dict[str, object] = {"kept_step": 4, "gate": {"reason": "its loss is not below the base's"}}
    worker(lambda stand_in: stand_in.succeed(report, step=6))
    result = smolora("train", rows, "--name", "codes", "--publish-if", "improves_base")
    assert result.exit_code == 0, result.output
    shown = "Stopped early after 6 of 9 steps: no evaluation was better than step 4's, whose weights are kept\n"
    assert shown in result.stdout


@pytest.mark.parametrize(
    ("step", "report", "shown"),
    [
        (9, {"kept_step": 4}, "No evaluation was better than step 4's, whose weights are kept\n"),
        (9, {"kept_step": 9}, None),
        (9, {}, None),  # the report lacks it
        (6, {}, "Stopped early after 6 of 9 steps\n"),
    ],
)
def test_kept_step_is_reported(
    smolora: Run,
    worker: Callable[[Callable[[StandIn], object]], None],
    rows: str,
    step: int,
    report: dict[str, object],
    shown: str | None,
) -> None:
    worker(lambda stand_in: stand_in.succeed({"name": "codes", **report}, digest="1" * 64, step=step))
    result = smolora("train", rows, "--name", "codes")
    assert result.exit_code == 0, result.output
    if shown is None:
        assert "Stopped early" not in result.stdout
        assert "weights are kept" not in result.stdout
    else:
        assert shown in result.stdout


def test_failed_gate_is_reported(
    smolora: Run, worker: Callable[[Callable[[StandIn], object]], None], rows: str
) -> None:
    worker(lambda stand_in: stand_in.succeed({"gate": {"reason": "its loss is not [below] the base's"}}))
    result = smolora("train", rows, "--name", "codes", "--publish-if", "improves_base")
    assert result.exit_code == 0
    assert "No version was published: its loss is not [below] the base's" in result.stdout


COMPARISON: dict[str, object] = {
    "version": None,
    "metric": "loss",
    "num_rows": 40,
    "includes_trained": False,
    "tuned": 2.0,
    "other": 1.0,
    "difference": 1.0,
    "low": 0.5,
    "high": 1.5,
    "verdict": "worse",
    "summary": "worse than the untouched base: loss 2.0000 against 1.0000",
}


@pytest.mark.parametrize(
    ("method", "advised", "useless"),
    [("lora", "--publish-if improves_base", "--method"), ("full", "--method lora", "--publish")],
)
def test_advice_if_worse_than_the_base(
    smolora: Run,
    worker: Callable[[Callable[[StandIn], object]], None],
    rows: str,
    method: str,
    advised: str,
    useless: str,
) -> None:
    comparisons = {"base": COMPARISON, "latest": None, "parent": None}
    report: dict[str, object] = {"gate": {"reason": "full or not"}, "comparisons": comparisons}
    worker(lambda stand_in: stand_in.succeed(report))
    result = smolora("train", rows, "--name", "codes", "--method", method)
    assert result.exit_code == 0, result.output
    advice = " ".join(result.stdout.split())
    assert "worse than the untouched base: loss 2.0000 against 1.0000" in advice
    assert advised in advice
    assert useless not in advice


def test_recall_and_the_version_before_are_shown(
    smolora: Run, worker: Callable[[Callable[[StandIn], object]], None], rows: str
) -> None:
    latest = COMPARISON | {"version": "codes@1", "summary": "worse than codes@1: 3 of 28 rows"}
    parent = COMPARISON | {"verdict": "can't tell", "summary": "neither clearly better nor worse than codes@2"}
    report: dict[str, object] = {
        "recall": {"num_rows": 25, "num_right": {"base": 0, "tuned": 24, "latest": 25, "parent": None}},
        "evaluation": {"num_completions": 3, "tuned": {"exact_match": 1 / 3}},
        "comparisons": {"base": None, "latest": latest, "parent": parent},
    }
    worker(lambda stand_in: stand_in.succeed(report | {"gate": {"reason": "none"}}))
    result = smolora("train", rows, "--name", "codes")
    shown = " ".join(result.stdout.split())
    assert "24 of 25 remembered, 1 of 3 held out" in shown
    assert "worse than codes@1: 3 of 28 rows neither clearly better nor worse than codes@2" in shown


def test_a_version_that_left_latest_behind_is_shown(
    smolora: Run, worker: Callable[[Callable[[StandIn], object]], None], rows: str
) -> None:
    worker(lambda stand_in: stand_in.succeed(digest="ab" * 32))
    assert "but latest stays" not in smolora("train", rows, "--name", "codes").stdout
    worker(lambda stand_in: stand_in.succeed(digest="cd" * 32, worse="worse than codes@1"))
    shown = " ".join(smolora("train", rows, "--name", "codes").stdout.split())
    assert ": the new version is worse than codes@1; PUT /adapters/codes/aliases/latest moves it" in shown
    assert "is published, but latest stays where it was" in shown


def test_train_prints_json(smolora: Run, worker: Callable[[Callable[[StandIn], object]], None], rows: str) -> None:
    worker(lambda stand_in: stand_in.fail("it is only a test"))
    result = smolora("train", rows, "--name", "codes", "--json")
    assert result.exit_code == 1
    job = json.loads(result.stdout)
    assert (job["status"], job["error"]) == ("failed", "it is only a test")


def test_failed_job_is_reported(
    smolora: Run, worker: Callable[[Callable[[StandIn], object]], None], rows: str
) -> None:
    worker(lambda stand_in: stand_in.fail("the loss [is] not a number"))
    result = smolora("train", rows, "--name", "codes")
    assert result.exit_code == 1
    assert "the loss [is] not a number" in result.stdout


def test_detached_job_is_steered(smolora: Run, rows: str) -> None:
    job_id = smolora("train", rows, "--name", "codes", "--detach").stdout.strip()
    assert json.loads(smolora("jobs", job_id, "--json").stdout)["status"] == "queued"
    assert job_id in smolora("jobs", "--status", "queued").stdout
    assert json.loads(smolora("jobs", job_id, "--pause", "--json").stdout)["status"] == "paused"
    assert json.loads(smolora("jobs", job_id, "--resume", "--json").stdout)["status"] == "queued"
    assert "cancelled" in smolora("jobs", job_id, "--cancel").stdout
    again = smolora("jobs", job_id, "--cancel")
    assert (again.exit_code, again.stderr) == (1, "smolora: the job has ended already: cancelled\n")
    followed = smolora("jobs", job_id, "--follow")
    assert followed.exit_code == 1
    assert "cancelled" in followed.stdout


def test_jobs_are_listed_with_projects(smolora: Run, server: Running, rows: str) -> None:
    _, secret = server.services.access.keys.create("ci", who="test", project="acme")
    acme = {"SMOLORA_API_KEY": secret}
    job_id = smolora("train", rows, "--name", "codes", "--detach", environment=acme).stdout.strip()
    heading, line = smolora("jobs", job_id).stdout.splitlines()
    assert (heading.split()[:3], line.split()[:3]) == (["job", "project", "name"], [job_id, "acme", "codes"])
    assert smolora("jobs", job_id, "--cancel").exit_code == 0
    own = smolora("train", rows, "--name", "codes", "--detach").stdout.strip()
    assert "project" not in smolora("jobs", own, "--cancel").stdout


def test_files_of_an_ended_job_are_removed(smolora: Run, server: Running, rows: str) -> None:
    job_id = smolora("train", rows, "--name", "codes", "--detach").stdout.strip()
    refused = smolora("jobs", job_id, "--delete")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("smolora: the job is queued: cancel it first")
    assert smolora("jobs", job_id, "--cancel").exit_code == 0
    directory = server.services.settings.home / "jobs" / job_id
    assert directory.exists()
    job = json.loads(smolora("jobs", job_id, "--delete", "--json").stdout)
    assert (job["status"], job["files_removed_at"] is None) == ("cancelled", False)
    assert not directory.exists()


def test_every_option_of_train_reaches_the_server(smolora: Run, rows: str, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.csv"
    held_out.write_text("text\nNot Found\n")
    options = {
        "validation": str(held_out),
        "rank": 4,
        "alpha": 8,
        "dropout": 0.25,
        "target-modules": "q_proj,v_proj",
        "init": "kaiming",
        "max-steps": 7,
        "learning-rate": 0.5,
        "batch-size": 3,
        "max-length": 33,
        "schedule": "linear",
        "warmup-ratio": 0.5,
        "weight-decay": 0.125,
        "max-grad-norm": 2,
        "seed": 5,
        "eval-steps": 2,
        "checkpoint-steps": 6,
        "patience": 4,
        "overlong": "refuse",
        "publish-if": "improves_base",
        "alias": "prod",
        "publish-metric": "loss",
        "description": "codes",
        "epochs": 9,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    result = smolora("train", rows, "--name=codes", *flags, "--rslora", "--no-packing", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    config = answer["config"]
    lora = {"rank": 4, "alpha": 8, "dropout": 0.25, "target_modules": ["q_proj", "v_proj"], "init": "kaiming"}
    assert config["lora"] == lora | {"use_rslora": True, "init_std": 1 / 16}
    training = {name.replace("-", "_"): value for name, value in options.items()}
    training |= {"early_stopping_patience": 4, "packing": False, "auto_epochs": False}
    assert config["training"] == {name: training[name] for name in config["training"]}
    top = ("publish_if", "publish_metric", "alias", "description")
    assert {name: config[name] for name in top} == {name: training[name] for name in top}
    assert (answer["data"]["rows"], answer["data"]["validation_rows"]) == (20, 1)


def test_target_modules_may_have_blanks(smolora: Run, rows: str) -> None:
    modules = "--target-modules=q_proj, v_proj"
    result = smolora("train", rows, "--name=codes", modules, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["config"]["lora"]["target_modules"] == ["q_proj", "v_proj"]


def test_dry_run_shows_the_rows(smolora: Run, rows: str) -> None:
    result = smolora("train", rows, "--name", "codes", "--validation", "0.5", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "7 rows to train on, 13 held out\n" in result.stdout
    assert "20 steps in 20 epochs: about" in result.stdout
    assert "<|im_end|>" in result.stdout
    assert result.stderr.startswith("smolora: the rows look like facts")


def test_dry_run_shows_what_happens_to_other_trainers_and_long_rows(smolora: Run, tmp_path: Path) -> None:
    rows = tmp_path / "alpaca.jsonl"
    document = {"text": "Not Found " * 200}
    rows.write_text(
        "".join(f"{json.dumps(row)}\n" for row in ({"instruction": "404?", "output": "Not Found"}, document))
    )
    result = smolora("train", str(rows), "--name", "codes", "--max-length", "128", "--max-steps", "3", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "1 row split\n" in result.stdout
    assert "3 steps: about" in result.stdout
    assert result.stderr.count("rows were read as Alpaca's") == 1
    assert result.stderr.count("1 row longer than training.max_length (128 tokens) split into ") == 1


def test_a_table_without_known_columns_gets_advice(smolora: Run, tmp_path: Path) -> None:
    table = tmp_path / "tickets.csv"
    table.write_text("ticket,team\nI was charged twice.,billing\n")
    result = smolora("train", str(table), "--name", "tickets")
    assert result.exit_code == 1
    assert "to learn team from ticket, name these columns completion and prompt" in " ".join(result.output.split())


def test_dry_run_leaves_no_data_set(smolora: Run, rows: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a dry", "completion": "run"}))
    before = smolora("datasets", "--json").stdout
    run = ("--name", "codes", "--dry-run")
    assert smolora("train", rows, "--validation", str(other), *run).exit_code == 0
    assert smolora("train", str(other), *run, "--publish-if", "improves_base").exit_code == 1
    assert smolora("datasets", "--json").stdout == before
    dataset = json.loads(smolora("datasets", "upload", str(other), "--json").stdout)
    assert smolora("train", str(other), *run).exit_code == 0
    kept = json.loads(smolora("datasets", "--json").stdout)["datasets"]
    assert dataset["id"] in [other["id"] for other in kept]
    assert f"{dataset['id']}  other.jsonl" in smolora("datasets").stdout
    other.write_text(json.dumps({"prompt": "a dry", "completion": "run", "source": "me"}))
    for command in (("datasets", "upload", str(other)), ("train", str(other), *run)):
        ignored = "smolora: fields that are not trained on were ignored: source in 1 row\n"
        assert smolora(*command).stderr == ignored
    assert smolora("datasets", "delete", dataset["id"]).exit_code == 0


def test_train_on_an_uploaded_data_set(smolora: Run, server: Running, rows: str) -> None:
    dataset = json.loads(smolora("datasets", "upload", rows, "--json").stdout)["id"]
    answer = json.loads(smolora("train", rows, "--name", "codes", "--dry-run", "--json").stdout)
    again = json.loads(smolora("train", dataset, "--name", "codes", "--dry-run", "--json").stdout)
    assert again["data"] == answer["data"]


def test_start_from_reaches_the_server(smolora: Run, rows: str) -> None:
    answer = json.loads(smolora("train", rows, "--name=more", "--start-from=up", "--dry-run", "--json").stdout)
    assert answer["config"]["start_from"] == "up@1"


def test_full_fine_tuning(smolora: Run, rows: str) -> None:
    answer = json.loads(smolora("train", rows, "--name=all", "--method=full", "--dry-run", "--json").stdout)
    assert answer["config"]["training"]["learning_rate"] == 3e-5


def test_refusals_of_the_server(smolora: Run, tmp_path: Path, rows: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 5}\n{"txt": "a"}\n')
    result = smolora("train", str(bad), "--name", "codes")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("smolora: line 2: text ")
    assert "smolora: line 3: text is missing, and txt is no field: did you mean text?" in result.stderr
    result = smolora("train", rows, "--name", "a b", "--rank", "0")
    assert result.exit_code == 1
    assert "lora.rank: " in result.stderr
    result = smolora("generate", "a", "--adapter", "nobody")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nobody" in result.stderr
    assert smolora("jobs", "nothing").exit_code == 1


def test_refusals_of_the_command(smolora: Run, rows: str, tmp_path: Path) -> None:
    missing = smolora("train", str(tmp_path / "nothing.jsonl"), "--name", "codes")
    assert missing.exit_code == 2
    assert "No such file" in missing.stderr
    assert smolora("jobs", "--cancel").exit_code == 2
    assert smolora("jobs", "a", "--cancel", "--pause").exit_code == 2
    assert smolora("jobs", "--delete").exit_code == 2
    assert smolora("jobs", "a", "--delete", "--pause").exit_code == 2


def test_missing_key_is_explained(smolora: Run) -> None:
    result = smolora("jobs", environment={"SMOLORA_API_KEY": ""})
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "smolora: send a valid key: set SMOLORA_API_KEY, or give --api-key\n"
    assert smolora("jobs", "--api-key", "secret-0123456789", environment={"SMOLORA_API_KEY": ""}).exit_code == 0


def test_refused_key_is_explained(smolora: Run) -> None:
    result = smolora("jobs", environment={"SMOLORA_API_KEY": "wrong-0123456789"})
    assert (result.exit_code, result.stdout) == (1, "")
    reason = (
        "that of SMOLORA_API_KEY or --api-key is unknown, revoked or expired; `smolora keys create NAME` makes one"
    )
    assert result.stderr == f"smolora: send a valid key: {reason}\n"


def test_unreachable_server_is_explained(smolora: Run) -> None:
    result = smolora("jobs", "--url", "http://127.0.0.1:9")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("smolora: can't reach http://127.0.0.1:9: ")
    assert result.stderr.count("\n") == 1
