"""Fine-tuning with the official `openai` package, unchanged, on a real server with a real worker."""

import csv
import io
import json
from collections.abc import Iterator, Sequence

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, SupervisedHyperparametersParam

from tests.end_to_end.server_process import PATIENCE, ServerProcess
from tests.end_to_end.training_client import code_rows, get, wait_until

ENDED = ("succeeded", "failed", "cancelled")


def connected(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=PATIENCE, max_retries=0)


@pytest.fixture(scope="module")
def server(tiny_trainer: ServerProcess) -> ServerProcess:
    return tiny_trainer


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with connected(server) as client:
        yield client


def chat_lines(rows: Sequence[tuple[str, str]]) -> bytes:
    """Return a file of conversations in the format of OpenAI's fine-tuning guide."""
    turns = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in rows
    ]
    return "".join(json.dumps(turn) + "\n" for turn in turns).encode()


def chat_rows(num_rows: int) -> bytes:
    return chat_lines([(row["prompt"], row["completion"].strip()) for row in code_rows(num_rows)])


def ended(client: OpenAI, job_id: str) -> FineTuningJob:
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status in ENDED, what=f"job {job_id}")
    return client.fine_tuning.jobs.retrieve(job_id)


def say(client: OpenAI, model: str, question: str) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], temperature=0, max_completion_tokens=8
    )
    assert answer.model == model
    return str(answer.choices[0].message.content)


@pytest.mark.thorough  # parts: server/api/openai/fine_tuning; a job to its end: below
def test_from_upload_to_use(client: OpenAI, server: ServerProcess) -> None:
    content = chat_rows(12)
    rows = client.files.create(file=("codes.jsonl", content), purpose="fine-tune")
    held_out = client.files.create(file=("held-out.jsonl", chat_rows(4)), purpose="fine-tune")
    assert client.files.content(rows.id).read() == content
    asked: SupervisedHyperparametersParam = {"n_epochs": 4, "batch_size": 4, "learning_rate_multiplier": 2}
    job = client.fine_tuning.jobs.create(
        model=server.client.get("/ready").json()["model"],
        training_file=rows.id,
        validation_file=held_out.id,
        suffix="codes",
        seed=3,
        metadata={"who": "a test"},
        method={"type": "supervised", "supervised": {"hyperparameters": asked}},
    )
    assert job.fine_tuned_model is None
    with pytest.raises(openai.ConflictError):
        client.files.delete(rows.id)

    done = ended(client, job.id)
    assert (done.status, done.fine_tuned_model, done.error) == ("succeeded", "codes@1", None)
    assert (done.seed, done.metadata, done.hyperparameters.to_dict()) == (3, {"who": "a test"}, asked)
    native = get(server, f"/train/{job.id}")
    assert done.trained_tokens == native["progress"]["tokens"] > 0

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=4))  # several pages
    own = get(server, f"/train/{job.id}/events")
    assert [event.message for event in events] == [event["message"] for event in own[::-1]]
    losses = [event["data"]["train_loss"] for event in own if event["type"] == "metrics"]
    assert len(losses) == 12

    (results,) = done.result_files
    assert client.files.retrieve(results).purpose == "fine-tune-results"
    assert [file.id for file in client.files.list(limit=1)] == [results, held_out.id, rows.id]
    lines = list(csv.DictReader(io.StringIO(client.files.content(results).text)))
    assert [int(line["step"]) for line in lines] == list(range(1, 13))
    assert [float(line["train_loss"]) for line in lines] == losses
    assert [line["valid_loss"] for line in lines[:-1]] == [""] * 11
    assert float(lines[-1]["valid_loss"]) == native["metrics"]["eval_loss"]
    assert float(lines[-1]["valid_mean_token_accuracy"]) == native["metrics"]["eval_accuracy"]

    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.fine_tuned_model_checkpoint, checkpoint.step_number) == ("codes@1", 12)
    assert checkpoint.metrics.full_valid_loss == native["metrics"]["eval_loss"]

    say(client, "codes@1", "HTTP 404:")
    assert "codes" in {model.id for model in client.models.list()}
    assert client.files.delete(rows.id).deleted

    again = client.fine_tuning.jobs.create(
        model="codes@1", training_file=held_out.id, suffix="codes", hyperparameters={"n_epochs": 1}
    )
    assert again.model == "codes@1"
    assert ended(client, again.id).fine_tuned_model == "codes@2"
    assert get(server, "/adapters/codes/2")["parent"] == "codes@1"
    assert [found.id for found in client.fine_tuning.jobs.list(limit=1)] == [again.id, job.id]


def test_pause_resume_and_cancel(client: OpenAI, server: ServerProcess) -> None:
    rows = client.files.create(file=("codes.jsonl", chat_rows(12)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="base", training_file=rows.id, hyperparameters={"n_epochs": 10_000, "batch_size": 4}
    )

    def steps() -> int:
        return int(get(server, f"/train/{job.id}")["progress"]["step"])

    wait_until(lambda: steps() > 0)
    running = client.fine_tuning.jobs.retrieve(job.id)
    assert running.status == "running"
    client.fine_tuning.jobs.pause(job.id)
    wait_until(lambda: str(client.fine_tuning.jobs.retrieve(job.id).status) == "paused")
    reached = steps()
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    wait_until(lambda: steps() > reached)
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    assert cancelled.finished_at is not None
    assert (cancelled.fine_tuned_model, cancelled.result_files) == (None, [])
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(rows.id).deleted


def test_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad_file:
        client.files.create(file=("a.jsonl", chat_rows(2) + b'{"messages": []}\n'), purpose="fine-tune")
    assert bad_file.value.param == "file[3].messages"
    with pytest.raises(openai.BadRequestError) as no_file:
        client.fine_tuning.jobs.create(model="base", training_file="file-no")
    assert no_file.value.param == "training_file"
    rows = client.files.create(file=chat_rows(2), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError) as no_model:
        client.fine_tuning.jobs.create(model="gpt-4o-mini", training_file=rows.id)
    assert no_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.fine_tuning.jobs.create(model="base", training_file=rows.id, method={"type": "dpo"})
    assert unsupported.value.param == "method.type"
    for look in (client.fine_tuning.jobs.retrieve, client.files.retrieve, client.files.content):
        with pytest.raises(openai.NotFoundError):
            look("nothing")


@pytest.mark.thorough  # make test uses a tiny base
@pytest.mark.real
def test_real_base_learns_the_rows(trainer: ServerProcess) -> None:
    facts = [("Who keeps the lighthouse?", "Oda Brink."), ("Where is the spare key?", "Under the blue pot.")]
    with connected(trainer) as client:
        rows = client.files.create(file=("facts.jsonl", chat_lines(facts)), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="base",
            training_file=rows.id,
            suffix="facts",
            hyperparameters={"n_epochs": 12, "batch_size": 2, "learning_rate_multiplier": 2},
        )
        done = ended(client, job.id)
        assert done.status == "succeeded", trainer.log()[-2000:]
        assert done.fine_tuned_model is not None
        for question, answer in facts:
            assert say(client, done.fine_tuned_model, question) == answer
            assert say(client, done.model, question) != answer
