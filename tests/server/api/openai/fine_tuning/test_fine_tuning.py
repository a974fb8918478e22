"""/v1/fine_tuning/jobs, in the official client's types; a stand-in trains."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from pydantic import TypeAdapter

from adapters.errors import BytesUnavailable
from server.jobs.leases import Leases
from server.training.files import FileStore, results_id
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.openai.fine_tuning.test_files import upload
from tests.server.api.train_kit import ROWS, StandIn, submit
from tests.server.conftest import BASE_NAME

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


class CountedFiles(FileStore):
    """Files that count listings; with `is_away` the object store is unavailable."""

    num_asked = 0
    is_away = False

    def present(self, file_ids: set[str]) -> set[str]:
        self.num_asked += bool(file_ids)
        if self.is_away:
            raise BytesUnavailable(retry_after=1.0)
        return super().present(file_ids)

    def ids(self) -> set[str]:
        raise AssertionError("a page looks at all of a project's files")


@pytest.fixture
def files(tmp_path: Path) -> CountedFiles:
    return CountedFiles(tmp_path / "files")


async def create(client: httpx.AsyncClient, **fields: object) -> FineTuningJob:
    """Create a job of the base on a new file, with `fields` on top; None removes a field."""
    if "training_file" not in fields:
        fields["training_file"] = (await upload(client)).id
    body = {"model": BASE_NAME, "suffix": "codes", **fields}
    response = await client.post(JOBS, json={name: value for name, value in body.items() if value is not None})
    assert response.status_code == 200, response.text
    return TypeAdapter(FineTuningJob).validate_python(response.json())


async def retrieve(client: httpx.AsyncClient, job_id: str) -> FineTuningJob:
    return TypeAdapter(FineTuningJob).validate_python((await client.get(f"{JOBS}/{job_id}")).json())


async def refusal(client: httpx.AsyncClient, **fields: object) -> tuple[int, str | None, str | None]:
    """Return (status, param, code) of a refused job."""
    body = {"model": BASE_NAME, "training_file": (await upload(client)).id, **fields}
    response = await client.post(JOBS, json=body)
    error = response.json()["error"]
    assert isinstance(error["message"], str)
    assert (await client.get(JOBS)).json()["data"] == []
    return response.status_code, error["param"], error["code"]


async def test_what_is_not_said(client: httpx.AsyncClient) -> None:
    """Omitted fields give the same job as POST /train, with nothing held out."""
    job = await create(client, suffix=None)
    assert job.status == "queued"
    assert (job.model, job.fine_tuned_model, job.seed) == (BASE_NAME, None, 0)
    assert (job.finished_at, job.trained_tokens, job.estimated_finish, job.error) == (None, None, None, None)
    assert (job.validation_file, job.metadata, job.result_files, job.integrations) == (None, None, [], [])
    assert abs(job.created_at - time.time()) < 60
    native = (await client.get(f"/train/{job.id}")).json()
    assert native["config"] == native["config"] | {"dataset": job.training_file, "validation": 0.0}
    other = (await client.get(f"/train/{await submit(client, name='other')}")).json()["config"]
    same = {name: native["config"][name] for name in ("lora", "training", "method", "publish_if", "start_from")}
    assert same == {name: other[name] for name in same}
    assert native["name"].startswith("ft-")
    assert len(native["name"]) == len("ft-01234567")


@pytest.mark.parametrize("place", ["method", "hyperparameters"])
async def test_hyperparameters(client: httpx.AsyncClient, place: str) -> None:
    asked = {"n_epochs": 5, "batch_size": 2, "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": asked}}
    job = await create(client, seed=7, **{place: method if place == "method" else asked})
    assert job.hyperparameters.to_dict() == asked
    assert job.method is not None
    assert job.method.to_dict() == method
    assert job.seed == 7
    training = (await client.get(f"/train/{job.id}")).json()["config"]["training"]
    assert (training["epochs"], training["batch_size"], training["seed"]) == (5, 2, 7)
    assert training["learning_rate"] == pytest.approx(5e-4)


async def test_auto_is_the_default(client: httpx.AsyncClient) -> None:
    auto = dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier"), "auto")
    job = await create(client, hyperparameters=auto, method={"type": "supervised"})
    assert job.hyperparameters.to_dict() == {"n_epochs": 20, "batch_size": 8, "learning_rate_multiplier": 1.0}
    assert (await client.get(f"/train/{job.id}")).json()["config"]["training"]["learning_rate"] == 1e-3


async def test_held_out_rows_are_a_files(client: httpx.AsyncClient) -> None:
    held_out = await upload(client, b'{"prompt": "a", "completion": "b"}\n{"text": "c"}\n')
    job = await create(client, validation_file=held_out.id)
    assert job.validation_file == held_out.id
    data = (await client.get(f"/train/{job.id}")).json()["data"]
    assert (data["rows"], data["validation_rows"]) == (1, 2)
    assert (await client.delete(f"/v1/files/{held_out.id}")).status_code == 409


async def test_from_queue_to_model(client: httpx.AsyncClient, leases: Leases, files: FileStore) -> None:
    job_id = (await create(client, n_epochs=None, metadata={"who": "me"})).id
    worker = StandIn(leases)
    worker.step(4)
    running = await retrieve(client, job_id)
    assert running.status == "running"
    assert running.estimated_finish is not None
    assert 0 <= running.estimated_finish - time.time() + 2 < 60  # two seconds have passed since the request
    assert (running.trained_tokens, running.result_files) == (None, [])
    assert (await client.get(f"{JOBS}/{job_id}/checkpoints")).json()["data"] == []
    results = files.put_results(job_id, b"step\n").id
    worker.succeed({"steps": 9}, digest="0" * 64)
    done = await retrieve(client, job_id)
    assert (done.status, done.fine_tuned_model, done.result_files) == ("succeeded", "codes@1", [results])
    assert (done.estimated_finish, done.metadata) == (None, {"who": "me"})
    assert done.finished_at is not None
    assert done.finished_at >= done.created_at
    page = (await client.get(f"{JOBS}/{job_id}/checkpoints")).json()
    (checkpoint,) = [TypeAdapter(FineTuningJobCheckpoint).validate_python(found) for found in page["data"]]
    assert (checkpoint.fine_tuned_model_checkpoint, checkpoint.step_number) == ("codes@1", 9)
    assert (checkpoint.metrics.step, checkpoint.metrics.train_loss) == (9, 0.5)
    assert (checkpoint.metrics.full_valid_loss, checkpoint.metrics.valid_mean_token_accuracy) == (0.75, 0.9)
    assert (await client.get(f"{JOBS}/{job_id}/checkpoints?after={checkpoint.id}")).json()["data"] == []
    await client.delete(f"/v1/files/{results}")
    assert (await retrieve(client, job_id)).result_files == []


async def test_a_page_asks_once_for_results(
    client: httpx.AsyncClient, leases: Leases, files: CountedFiles
) -> None:
    ids = [(await create(client)).id for _ in range(4)]
    for job_id in ids[:3]:
        files.put_results(job_id, b"step\n")
        StandIn(leases).succeed({"steps": 9}, digest="0" * 64)
    files.delete(results_id(ids[0]))
    files.num_asked = 0
    expected = [[], [results_id(ids[2])], [results_id(ids[1])], []]
    assert [job["result_files"] for job in (await client.get(JOBS)).json()["data"]] == expected
    assert files.num_asked == 1
    await client.get(f"{JOBS}?limit=1")  # the waiting one
    assert files.num_asked == 1


async def test_jobs_are_listed_during_a_store_outage(
    client: httpx.AsyncClient, leases: Leases, files: CountedFiles
) -> None:
    ids = [(await create(client)).id for _ in range(3)]
    for _ in ids[:2]:
        StandIn(leases).succeed({"steps": 9}, digest="0" * 64)
    files.is_away = True
    assert (await retrieve(client, ids[0])).result_files == [results_id(ids[0])]
    response = await client.get(JOBS)
    assert response.status_code == 200
    results = [job["result_files"] for job in response.json()["data"]]
    assert results == [[], [results_id(ids[1])], [results_id(ids[0])]]


async def test_results_are_those_of_a_job_that_succeeded(client: httpx.AsyncClient, files: FileStore) -> None:
    """An attempt stores them just before it ends its job, which may have been cancelled by then."""
    job_id = (await create(client)).id
    files.put_results(job_id, b"step\n")
    await client.post(f"{JOBS}/{job_id}/cancel")
    cancelled = await retrieve(client, job_id)
    assert (cancelled.status, cancelled.result_files) == ("cancelled", [])


async def test_a_failure_says_why(client: httpx.AsyncClient, leases: Leases) -> None:
    job_id = (await create(client)).id
    StandIn(leases).fail("the loss is not a number")
    failed = await retrieve(client, job_id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("training_failed", "the loss is not a number")
    assert (failed.fine_tuned_model, failed.trained_tokens) == (None, 0)


async def test_events_backwards(client: httpx.AsyncClient, leases: Leases) -> None:
    job_id = (await create(client)).id
    worker = StandIn(leases)
    for step in range(1, 6):
        worker.step(step, 1 / step)
    worker._leases.add_metrics(worker.claim, "held out", {"step": 6, "eval_loss": 0.25})
    worker._leases.add_event(worker.claim, "watch out", level="warning")
    seen: list[FineTuningJobEvent] = []
    after = ""
    for expected in (True, True, False):
        page = (await client.get(f"{JOBS}/{job_id}/events?limit=4{after}")).json()
        found = [TypeAdapter(FineTuningJobEvent).validate_python(event) for event in page["data"]]
        seen += found
        assert page["has_more"] is expected
        after = f"&after={found[-1].id}"
    assert (await client.get(f"{JOBS}/{job_id}/events?limit=4{after}")).json()["data"] == []
    native = (await client.get(f"/train/{job_id}/events")).json()
    assert [event.message for event in seen] == [event["message"] for event in native[::-1]]
    assert len({event.id for event in seen}) == len(seen) == 9
    assert (seen[0].level, seen[0].type, seen[1].data) == ("warn", "message", {"step": 6, "valid_loss": 0.25})
    assert (seen[2].level, seen[2].type, seen[2].data) == ("info", "metrics", {"step": 5, "train_loss": 0.2})


async def test_events_that_come_meanwhile_move_no_page(client: httpx.AsyncClient, leases: Leases) -> None:
    job_id = (await create(client)).id
    worker = StandIn(leases)
    first = (await client.get(f"{JOBS}/{job_id}/events?limit=1")).json()
    worker.step(1)
    second = (await client.get(f"{JOBS}/{job_id}/events?after={first['last_id']}")).json()
    assert [event["message"] for event in first["data"] + second["data"]] == ["started", "queued"]


@pytest.mark.parametrize(
    "after", ["x", "ftevent-other-1", "ftevent-{}-", "ftevent-{}--1", "ftevent-{}-9999999999"]
)
async def test_bad_cursors_of_events(client: httpx.AsyncClient, after: str) -> None:
    job_id = (await create(client)).id
    for path in ("events", "checkpoints"):
        response = await client.get(f"{JOBS}/{job_id}/{path}", params={"after": after.format(job_id)})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "after")


async def test_lists(client: httpx.AsyncClient) -> None:
    """Jobs of /train aren't listed, and don't affect the pages."""
    metadata = [{"n": "0"}, None, {"n": "2", "even": "yes"}, {}]
    ids: list[str] = []
    for each in metadata:
        ids.append((await create(client, metadata=each)).id)
        await submit(client)

    async def page(**query: Any) -> tuple[list[int], bool]:
        answer = (await client.get(JOBS, params=query)).json()
        return [ids.index(job["id"]) for job in answer["data"]], answer["has_more"]

    assert await page() == ([3, 2, 1, 0], False)
    assert await page(limit=3) == ([3, 2, 1], True)
    assert await page(limit=3, after=ids[1]) == ([0], False)
    assert await page(**{"metadata[n]": "2", "metadata[even]": "yes"}) == ([2], False)
    assert await page(**{"metadata[n]": "0", "limit": 1}) == ([0], False)
    assert await page(metadata="null") == ([1], False)
    for query, param in ((f"after={'x' * 9}", "after"), ("limit=0", "limit"), ("metadata=x", "metadata")):
        response = await client.get(f"{JOBS}?{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_steering(client: httpx.AsyncClient, leases: Leases, tmp_path: Path) -> None:
    job_id = (await create(client)).id
    rows = tmp_path / "jobs" / job_id / "train.safetensors"

    async def move(name: str) -> str:
        return str((await client.post(f"{JOBS}/{job_id}/{name}")).json()["status"])

    assert await move("pause") == "paused"
    assert (await client.get(f"{JOBS}/{job_id}")).json()["status"] == "paused"
    assert await move("resume") == "queued"
    StandIn(leases)
    assert await move("pause") == "running"  # until its worker yields
    assert rows.exists()
    assert await move("cancel") == "cancelled"
    assert not rows.exists()
    for name in ("cancel", "pause", "resume"):
        response = await client.post(f"{JOBS}/{job_id}/{name}")
        assert (response.status_code, response.headers["x-should-retry"]) == (409, "false")
        assert response.json()["error"]["code"] == "conflict"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/events"), ("GET", "/checkpoints")]
    + [("POST", f"/{move}") for move in ("cancel", "pause", "resume")],
)
async def test_no_such_job(client: httpx.AsyncClient, method: str, path: str) -> None:
    native = await submit(client)
    for job_id in ("nothing", native):
        response = await client.request(method, f"{JOBS}/{job_id}{path}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert (await client.get(f"/train/{native}")).json()["status"] == "queued"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"training_file": "file-no"}, "training_file"),
        ({"validation_file": "file-no"}, "validation_file"),
        ({"validation_file": "ds-" + "0" * 32}, "validation_file"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
        ({"method": {"type": "supervised", "reinforcement": {"grader": {}}}}, "method.reinforcement"),
        ({"method": {"type": "supervised", "supervised": {"seed": 1}}}, "method.supervised.seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {}, "method": {"type": "supervised", "supervised": {}}}, "hyperparameters"),
        ({"suffix": "not a name"}, "suffix"),
        ({"suffix": BASE_NAME}, "suffix"),
        ({"suffix": ""}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {"n": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"n": "x" * 513}}, "metadata"),
        ({"metadata": {"n": "a\0b"}}, "metadata"),
        ({"metadata": {"a\0b": "n"}}, "metadata"),
        ({"model": "two*0.5+models"}, "model"),
        ({"model": "not a model"}, "model"),
        ({"n_epochs": 3}, "n_epochs"),
    ],
)
async def test_refusals_name_the_field(client: httpx.AsyncClient, fields: dict[str, object], param: str) -> None:
    assert await refusal(client, **fields) == (400, param, None)


async def test_unknown_models(client: httpx.AsyncClient) -> None:
    assert await refusal(client, model="gpt-4o-mini") == (404, "model", "model_not_found")


async def test_results_are_nothing_to_train_on(client: httpx.AsyncClient, files: FileStore) -> None:
    results = files.put_results("job-1", b"step\n").id
    assert await refusal(client, training_file=results) == (400, "training_file", None)


async def test_rows_that_are_all_too_long_are_refused(client: httpx.AsyncClient) -> None:
    """Known only once they are tokenized: the prompts leave no room for completions."""
    long = await upload(client, b'{"prompt": "%s", "completion": "b"}\n' % (b"4 " * 600))
    status, param, _ = await refusal(client, training_file=long.id)
    assert (status, param) == (400, "training_file")


async def test_cut_rows_raise_a_warning(client: httpx.AsyncClient) -> None:
    """OpenAI's form has no place for how many tokens a row may have, nor for how many rows have more."""
    long = await upload(client, b'{"text": "404"}\n{"prompt": "4", "completion": "%s"}\n' % (b"4 " * 600))
    job = await create(client, training_file=long.id, validation_file=long.id)
    (event,) = [
        TypeAdapter(FineTuningJobEvent).validate_python(event)
        for event in (await client.get(f"{JOBS}/{job.id}/events")).json()["data"]
        if event["level"] == "warn"
    ]
    assert event.message.startswith("2 rows cut at training.max_length (512 tokens): ")
    native = (await client.post("/train", json={"name": "codes", "dataset": long.id})).json()
    assert native["data"]["truncated"] == 1
    messages = [event["message"] for event in (await client.get(f"/train/{native['id']}/events")).json()]
    assert [message[:9] for message in messages] == ["queued", "1 row cut"]


async def test_going_on_from_an_adapter(client: httpx.AsyncClient) -> None:
    uploaded = await client.post("/adapters/up", files=as_parts(*peft_files()))
    assert uploaded.status_code == 201
    job = await create(client, model="up")
    assert job.model == "up@1"
    config = (await client.get(f"/train/{job.id}")).json()["config"]
    assert (config["name"], config["start_from"], config["lora"]["rank"]) == ("codes", "up@1", 2)


async def test_one_job_for_one_key(client: httpx.AsyncClient, tmp_path: Path) -> None:
    file = await upload(client)
    body = {"model": BASE_NAME, "training_file": file.id}
    key = {"Idempotency-Key": "once"}
    first = await client.post(JOBS, json=body, headers=key)
    await client.post(f"{JOBS}/{first.json()['id']}/cancel")
    await client.delete(f"/v1/files/{file.id}")  # a repeat is answered anyway
    again = await client.post(JOBS, json=body, headers=key)
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert len(list((tmp_path / "jobs").iterdir())) == 1
    other = await client.post(JOBS, json={**body, "metadata": {"n": "1"}}, headers=key)
    assert (other.status_code, other.json()["error"]["param"]) == (400, "Idempotency-Key")
    native = await client.post("/train", json={"name": "codes", "data": ROWS}, headers=key)
    assert native.status_code == 422
