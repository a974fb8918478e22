"""POST /train with rows of decisions: the questions, what is refused, and what is stored with the job."""

import json
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from server.decisions.questions import parse_question
from server.decisions.stored import StoredDecisions
from server.training.job_data import JobData
from tests.server.api.train_kit import submit, train_body
from tests.server.conftest import MAX_POSITIONS

pytestmark = pytest.mark.anyio

TEAM = {"type": "choice", "instructions": "Team?", "choices": [{"value": "a"}, {"value": "b"}]}
SPAM = {"type": "predicate", "instructions": "Spam?"}
ROWS = [{"input": f"Ticket {n}", "answer": "ab"[n % 2], "question": "team"} for n in range(20)]
TRAINING = {"max_length": MAX_POSITIONS}


async def test_questions_are_stored_with_the_job(client: httpx.AsyncClient, tmp_path: Path) -> None:
    rows = [*ROWS, {"input": "Win!", "answer": True, "question": {**SPAM, "name": "spam"}}]
    job_id = await submit(client, data=rows, questions={"team": TEAM}, training=TRAINING)
    stored = JobData.load(tmp_path / "jobs" / job_id).decisions
    team, spam = parse_question({**TEAM, "name": "team"}), parse_question({**SPAM, "name": "spam"})
    assert stored is not None
    assert set(stored.questions) == {team, spam} or set(stored.questions) == {team}  # spam's row may be held out
    assert StoredDecisions.of({"decisions": json.loads(json.dumps(stored.document()))}) == stored


async def test_the_only_question_may_be_left_out(client: httpx.AsyncClient, tmp_path: Path) -> None:
    rows = [{"input": row["input"], "answer": row["answer"]} for row in ROWS]
    job_id = await submit(client, data=rows, questions={"team": TEAM}, training=TRAINING)
    stored = JobData.load(tmp_path / "jobs" / job_id).decisions
    assert stored is not None
    assert [question.name for question in stored.questions] == ["team"]
    job = (await client.get(f"/train/{job_id}")).json()
    assert set(job["data"]["kinds"]) == {"decision"}


async def test_other_rows_store_no_questions(client: httpx.AsyncClient, tmp_path: Path) -> None:
    job_id = await submit(client)
    assert JobData.load(tmp_path / "jobs" / job_id).decisions is None


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, "data.0.question: is no question of the job: none"),
        ({"questions": {"other": SPAM}}, "data.0.question: is no question of the job: other"),
        ({"questions": {"team": SPAM}}, "data.0.answer: must be true or false: the question is a predicate"),
        (
            {"questions": {"team": {**TEAM, "choices": [{"value": "a"}]}}},
            "questions.team.choices: must be a list of 2 to 255, not 1",
        ),
        ({"questions": {"team": {**TEAM, "name": "x"}}}, "questions.team.name: contradicts team: leave it out"),
        ({"questions": {"": TEAM}}, "questions: must be a text of 1 to 128 characters"),
    ],
)
async def test_bad_questions_and_answers_are_refused(
    client: httpx.AsyncClient, fields: Mapping[str, object], fault: str
) -> None:
    body = {"name": "team", "data": ROWS, "training": TRAINING, **fields}
    response = await client.post("/train", json=body)
    assert response.status_code == 422, response.text
    assert fault in response.json()["detail"]
    assert (await client.get("/train")).json()["jobs"] == []


async def test_a_dry_run_shows_the_prompt_that_decide_asks(client: httpx.AsyncClient) -> None:
    body = {"name": "team", "data": ROWS, "questions": {"team": TEAM}, "training": TRAINING}
    response = await client.post("/train", params={"dry_run": "true"}, json=body)
    assert response.status_code == 200, response.text
    tokens = response.json()["preview"][0]["tokens"]
    assert "".join(token["text"] for token in tokens if token["trained"]) in ("a<|im_end|>", "b<|im_end|>")
    asked = "".join(token["text"] for token in tokens if not token["trained"])
    assert asked.endswith("Answer with one option.<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("metric", ["accuracy", "brier"])
async def test_metrics_of_decisions_need_decisions(client: httpx.AsyncClient, metric: str) -> None:
    fields = {"publish_metric": metric, "publish_if": "improves_base", "validation": 0.2}
    response = await client.post("/train", json=train_body(**fields))
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["loc"] == ["publish_metric"]
    assert error["message"] == (
        f"{metric} needs rows of decisions (input and answer): set it to loss or exact_match"
    )
    job_id = await submit(client, data=ROWS, questions={"team": TEAM}, training=TRAINING, **fields)
    assert (await client.get(f"/train/{job_id}")).json()["config"]["publish_metric"] == metric


async def test_evaluations_of_few_decisions_raise_a_warning(client: httpx.AsyncClient) -> None:
    for num_rows, is_warned in ((19, True), (20, False)):
        body = {
            "name": "team",
            "data": ROWS,
            "validation": [{**row, "input": f"New {n}"} for n, row in enumerate(ROWS[:num_rows])],
            "questions": {"team": TEAM},
            "training": {**TRAINING, "eval_steps": 4},
            "publish_metric": "brier",
        }
        answer = (await client.post("/train?dry_run=true", json=body)).json()
        warning = f"only {num_rows} distinct rows of decisions held out"
        assert any(one.startswith(warning) for one in answer["warnings"]) is is_warned
