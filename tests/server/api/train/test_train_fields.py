"""Every field and row of POST /train that can't be honoured is a 422 that names it, and leaves nothing behind."""

import json
from pathlib import Path

import httpx
import pytest

from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import ROWS, train_body
from tests.server.conftest import BASE_NAME, MAX_POSITIONS

pytestmark = pytest.mark.anyio

ROW = {"prompt": "a", "completion": "b"}


def each(field: str, *values: object) -> list[tuple[str, object]]:
    return [(field, value) for value in values]


LORA: list[tuple[str, object]] = [
    *each("rank", 0, -1, 257, 1.5, "8", True, None),
    *each("alpha", 0, -1, 1e9, "32", float("nan"), float("inf")),
    *each("dropout", -0.1, 1, 1.5, "0", None, float("nan")),
    *each("target_modules", "all", "", "q_proj", [], ["lm_head"], ["q_proj", "q_proj"], [5]),
    *each("target_modules", None, {}, ["q_proj", None], [["q_proj"]], ["all-linear"]),
    *each("init", "", "zeros", None, 1, True),
    *each("use_rslora", 1, "true", None),
    ("r", 8),
]
TRAINING: list[tuple[str, object]] = [
    *each("epochs", 0, -1, 1.5, "3", "auto", True, 10**6, 10**30),
    *each("max_steps", 0, -1, 1.5, "3", 10**6 + 1),
    *each("learning_rate", 0, -1e-3, "1e-3", True, float("nan"), float("inf"), 10**400),
    *each("batch_size", 0, -1, 1.5, "8", None, 4097),
    *each("max_length", 0, 1, 1.5, "8", None, MAX_POSITIONS + 1, 1 << 40),
    *each("schedule", "", "step", None, 1),
    *each("warmup_ratio", -0.1, 1.1, "0", None, float("nan")),
    *each("weight_decay", -0.1, 11, None, float("inf")),
    *each("max_grad_norm", 0, -1, None, "1", float("nan")),
    *each("seed", -1, 1 << 63, 1.0, "0", None),
    *each("eval_steps", 0, -1, "5", 1.5, True),
    *each("checkpoint_steps", 0, -1, "5", 1.5),
    *each("early_stopping_patience", 0, -1, "5", 1.5, 3),  # 3: without eval_steps
    *each("packing", 1, "true", None),
    *each("overlong", "", "window", None),
    ("optimizer", "sgd"),
]
OUTER: list[tuple[str, object]] = [
    *each("name", "", "a b", "-a", "x" * 65, "base", BASE_NAME, 5, None, "a/b"),
    *each("data", [], "text", {}, 5, "ds-0"),
    *each("validation", -0.1, 1, 1.5, True, [], {}, float("nan"), 10**400),
    *each("method", "", "qlora", None, 1),
    *each("lora", None, [], "all", 5),
    *each("training", None, [], 5),
    *each("start_from", "", "a b", "a*0.5", "a+b", "a@0", 5, "x" * 500),
    *each("publish_if", "", "never", None, True),
    *each("publish_metric", "", "bleu", None, True),
    *each("alias", "", "a b", "7", "base", "x" * 65, 5),
    *each("description", 5, None, "x" * 2001),
    ("dataset", "x" * 65),
    ("dataset", 5),
    ("base", "other"),
    ("", 1),
]


async def refused(client: httpx.AsyncClient, body: object, home: Path) -> list[list[str | int]]:
    """Where the faults are."""
    content = json.dumps(body)  # with NaN and Infinity, as Python writes them
    response = await client.post("/train", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) < 10_000
    assert not list(home.glob("jobs/*"))
    errors = response.json()["errors"]
    assert all(error["message"] for error in errors)
    return [error["loc"] for error in errors]


@pytest.mark.parametrize(("field", "value"), LORA, ids=repr)
async def test_bad_lora(client: httpx.AsyncClient, field: str, value: object, tmp_path: Path) -> None:
    assert ["lora", field] in await refused(client, train_body(lora={field: value}), tmp_path)


@pytest.mark.parametrize(("field", "value"), TRAINING, ids=repr)
async def test_bad_training(client: httpx.AsyncClient, field: str, value: object, tmp_path: Path) -> None:
    assert ["training", field] in await refused(client, train_body(training={field: value}), tmp_path)


@pytest.mark.parametrize(("field", "value"), OUTER, ids=repr)
async def test_bad_fields(client: httpx.AsyncClient, field: str, value: object, tmp_path: Path) -> None:
    places = await refused(client, train_body() | {field: value}, tmp_path)
    assert field in [place[-1] for place in places]


async def test_a_description_that_no_database_takes(client: httpx.AsyncClient, tmp_path: Path) -> None:
    """A dry run says so, too, and the place is the body's."""
    body = train_body(description="a\0b")
    assert await refused(client, body, tmp_path) == [["description"]]
    assert (await client.post("/train?dry_run=true", json=body)).status_code == 422


@pytest.mark.parametrize(
    ("row", "place"),
    [
        (5, ["data"]),
        ("text", ["data"]),
        (None, ["data"]),
        ([], ["data"]),
        ({}, ["data", 1, "prompt"]),
        ({"prompt": "a"}, ["data", 1, "completion"]),
        ({"completion": "a"}, ["data", 1, "prompt"]),
        ({"prompt": "a", "completion": ""}, ["data", 1, "completion"]),
        ({"prompt": "", "completion": "a"}, ["data", 1, "prompt"]),
        ({"prompt": "a", "completion": 5}, ["data", 1, "completion"]),
        ({"prompt": "a", "completion": "b", "text": "c"}, ["data", 1, "text"]),
        ({"text": ""}, ["data", 1, "text"]),
        ({"text": None}, ["data", 1, "text"]),
        ({"messages": []}, ["data", 1, "messages"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["data", 1, "messages"]),
        ({"messages": [{"role": "robot", "content": "a"}]}, ["data", 1, "messages", 0, "role"]),
        ({"messages": [{"role": "assistant", "content": ""}]}, ["data", 1, "messages", 0, "content"]),
    ],
)
async def test_bad_rows(client: httpx.AsyncClient, row: object, place: list[str | int], tmp_path: Path) -> None:
    assert place in await refused(client, train_body(data=[ROW, row]), tmp_path)
    place = ["validation", *place[1:]]
    assert place in await refused(client, train_body(validation=[ROW, row]), tmp_path)


async def test_faults_of_many_rows(client: httpx.AsyncClient, tmp_path: Path) -> None:
    places = await refused(client, train_body(data=[{"text": "a"}, *[{"text": ""}] * 5000]), tmp_path)
    assert places == [["data", number, "text"] for number in range(1, 21)] + [["data"]]


async def test_rows_are_counted_as_they_were_sent(client: httpx.AsyncClient, tmp_path: Path) -> None:
    """Whichever of them are held out."""
    rows = [{"prompt": f"{number} " * (30 if number % 3 else 1), "completion": "b"} for number in range(12)]
    body = train_body(data=rows, validation=0.5, training={"max_length": 8, "overlong": "truncate"})
    expected = [["data", number, "completion"] for number in range(12) if number % 3]
    assert await refused(client, body, tmp_path) == expected


async def test_what_is_too_long_can_be_refused(client: httpx.AsyncClient, tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"text": "Not Found " * 50}]
    body = train_body(data=rows, training={"max_length": 16, "overlong": "refuse"})
    assert await refused(client, body, tmp_path) == [["data", 3, "text"]]


@pytest.mark.parametrize("fields", [{}, {"data": [ROW], "dataset": "ds-" + "0" * 32}])
async def test_data_or_dataset(client: httpx.AsyncClient, fields: dict[str, object], tmp_path: Path) -> None:
    assert await refused(client, {"name": "codes", **fields}, tmp_path) == [["data"], ["dataset"]]


async def test_a_share_that_leaves_nothing(client: httpx.AsyncClient, tmp_path: Path) -> None:
    assert await refused(client, train_body(data=[ROW] * 5, validation=0.2), tmp_path) == [["validation"]]


@pytest.mark.parametrize("gate", ["improves_base", "improves_latest", "not_worse"])
async def test_a_gate_needs_validation(client: httpx.AsyncClient, gate: str, tmp_path: Path) -> None:
    assert await refused(client, train_body(data=ROWS[:19], publish_if=gate), tmp_path) == [["publish_if"]]
    assert await refused(client, train_body(validation=0, publish_if=gate), tmp_path) == [["publish_if"]]
    response = await client.post("/train", json=train_body(publish_if=gate))
    assert response.status_code == 202


async def test_exact_match_needs_completions(client: httpx.AsyncClient, tmp_path: Path) -> None:
    texts = [{"text": f"row {number}"} for number in range(30)]
    assert await refused(client, train_body(data=texts, publish_metric="exact_match"), tmp_path) == [
        ["publish_metric"]
    ]
    response = await client.post("/train", json=train_body(publish_metric="exact_match"))
    assert response.status_code == 202


async def test_evaluations_of_few_rows_raise_a_warning(client: httpx.AsyncClient) -> None:
    """Below 20 distinct held-out rows they choose no step and stop nothing. A document's windows are one row."""
    document: list[dict[str, object]] = [{"text": "OK " * 12_000}]
    text: list[dict[str, object]] = [{"text": f"row {number}"} for number in range(20)]
    for validation, metric, is_warned in (
        (ROWS[:19], "loss", True),
        (ROWS, "loss", False),
        (ROWS, "exact_match", False),
        (ROWS[:10] * 3, "loss", True),
        (ROWS[:10] * 3, "exact_match", True),
        (document, "loss", True),
        (text, "loss", False),
        (text, "exact_match", True),
    ):
        body = train_body(validation=validation, training={"eval_steps": 4}, publish_metric=metric)
        answer = (await client.post("/train?dry_run=true", json=body)).json()
        assert any("evaluations choose no step" in warning for warning in answer["warnings"]) is is_warned


@pytest.mark.parametrize(
    ("gate", "result"),
    [
        ("improves_base", "lets no version pass"),
        ("improves_latest", "lets no version pass"),
        ("not_worse", "holds no version back"),
    ],
)
async def test_a_gate_that_decides_nothing_raises_a_warning(
    client: httpx.AsyncClient, gate: str, result: str
) -> None:
    """Without completions, a verdict takes 20 held-out rows."""
    texts = [{"text": f"row {number}"} for number in range(60)]
    for data, validation, publish_if, expected in (
        (texts[20:], texts[:19], gate, 1),
        (texts[20:], texts[:20], gate, 0),
        (ROWS, ROWS[:19], gate, 0),
        (texts[20:], texts[:19], "always", 0),
    ):
        body = train_body(data=data, validation=validation, publish_if=publish_if)
        answer = (await client.post("/train?dry_run=true", json=body)).json()
        assert sum(f"publish_if {gate} {result}" in warning for warning in answer["warnings"]) == expected


async def test_evaluations_need_validation(client: httpx.AsyncClient, tmp_path: Path) -> None:
    body = train_body(validation=0, training={"eval_steps": 2})
    assert await refused(client, body, tmp_path) == [["training", "eval_steps"]]


async def test_more_steps_than_may_be(client: httpx.AsyncClient, tmp_path: Path) -> None:
    body = train_body(data=[ROW] * 200, training={"epochs": 10_000, "batch_size": 1}, validation=0)
    assert await refused(client, body, tmp_path) == [["training", "epochs"]]


@pytest.mark.parametrize("field", ["alias", "start_from"])
async def test_full_fine_tuning_has_no_adapter(client: httpx.AsyncClient, field: str, tmp_path: Path) -> None:
    await client.post("/adapters/up", files=as_parts(*peft_files()))
    assert await refused(client, train_body(method="full") | {field: "up"}, tmp_path) == [[field]]


async def errors_of(client: httpx.AsyncClient, **body: object) -> dict[tuple[str, ...], str]:
    """What is refused, and how it is said."""
    response = await client.post("/train", json=train_body(**body))
    assert response.status_code in (202, 422), response.text
    return {tuple(error["loc"]): error["message"] for error in response.json().get("errors", [])}


@pytest.mark.parametrize("lora", [{"rank": 8}, {"rank": 16}, {"dropout": 0.1, "init": "pissa"}])
async def test_full_fine_tuning_takes_no_shape_of_an_adapter(
    client: httpx.AsyncClient, lora: dict[str, object]
) -> None:
    """Not the default one either: whoever gives it expects an adapter."""
    (said,) = (await errors_of(client, method="full", lora=lora)).items()
    assert said[0] == ("lora",)
    assert "leave it out, or set method to lora" in said[1]
    assert not await errors_of(client, method="full", lora={})
    assert not await errors_of(client, method="full", publish_if="always")


@pytest.mark.parametrize("gate", ["improves_base", "improves_latest", "not_worse"])
async def test_full_fine_tuning_has_no_gate(client: httpx.AsyncClient, gate: str) -> None:
    (said,) = (await errors_of(client, method="full", publish_if=gate)).items()
    assert said[0] == ("publish_if",)
    assert "leave it out" in said[1]


@pytest.mark.parametrize("init", ["gaussian", "kaiming", "pissa", "olora"])
async def test_start_from_excludes_other_initializations(client: httpx.AsyncClient, init: str) -> None:
    await client.post("/adapters/up", files=as_parts(*peft_files()))
    (said,) = (await errors_of(client, start_from="up", lora={"init": init, "dropout": 0.1})).items()
    assert said[0] == ("lora", "init")
    assert "leave it out" in said[1]
    assert not await errors_of(client, start_from=BASE_NAME, lora={"init": init})
    assert not await errors_of(client, start_from="up", lora={"dropout": 0.1})


@pytest.mark.parametrize(("rank", "may_train"), [(512, True), (513, False)])
async def test_a_parent_of_a_huge_rank(client: httpx.AsyncClient, rank: int, may_train: bool) -> None:
    """What pissa publishes at the largest rank that it trains is no more than 512."""
    files = as_parts(*peft_files(rank=rank))
    assert (await client.post("/adapters/up", files=files)).status_code == 201
    said = await errors_of(client, start_from="up")
    assert list(said) == ([] if may_train else [("start_from",)])
    assert may_train or "512 at most: merge it into an adapter of smaller rank" in said["start_from",]


async def test_refusals_quote_no_row(client: httpx.AsyncClient) -> None:
    secret = "xyzzy"
    rows = [{"prompt": secret, "completion": [secret]}, {"messages": [{"role": secret, "content": secret}]}]
    response = await client.post("/train", json=train_body(data=rows, validation=secret * 3, start_from=None))
    assert response.status_code == 422
    assert secret not in response.text
