"""POST /train, as API.md has it: rows, defaults, repeats, dry runs and parents."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from server.api import train
from server.jobs.leases import Leases
from server.training.encoding import RowEncoder
from server.training.job_data import JobData
from server.training.rows import Row
from server.training.spec import Overlong
from tests.kits.tiny import tiny_tokenizer
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.train_kit import CONFIG, ROWS, StandIn, submit, train_body

pytestmark = pytest.mark.anyio


def held_out(rows: list[dict[str, object]], share: float) -> list[dict[str, object]]:
    """The rows whose SHA-256 of canonical JSON is below the share, in their order: API.md's rule, done by hand."""

    def place(row: dict[str, object]) -> float:
        text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256

    return [row for row in rows if place(row) < share]


def tokens(row: Mapping[str, object]) -> list[int]:
    tokenizer = tiny_tokenizer()
    pieces = [tokenizer.encode(str(row[name]), add_special_tokens=False) for name in ("prompt", "completion")]
    return [*pieces[0], *pieces[1], tokenizer.eos_token_id]


async def test_a_body_of_name_and_data(client: httpx.AsyncClient, tmp_path: Path) -> None:
    response = await client.post("/train", json=train_body())
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/train/{job['id']}"
    created = datetime.fromisoformat(job["created_at"])
    assert timedelta() <= datetime.now(UTC) - created < timedelta(minutes=1)
    validation = held_out(ROWS, 0.1)
    train = [row for row in ROWS if row not in validation]
    assert job == {
        "id": job["id"],
        "project": "default",
        "key": None,
        "kind": "train",
        "name": "codes",
        "status": "queued",
        "position": 1,
        "pausing": False,
        "progress": {
            "step": 0,
            "total_steps": 20 * 2,
            "epoch": 0.0,
            "tokens": 0,
            "tokens_per_second": None,
            "eta_seconds": None,
        },
        "metrics": {"train_loss": None, "eval_loss": None, "base_eval_loss": None},
        "adapter": None,
        "error": None,
        "created_at": job["created_at"],
        "started_at": None,
        "finished_at": None,
        "files_removed_at": None,
        "config": {**CONFIG, "dataset": None, "validation": 0.1, "test": 0},
        "data": {
            "digest": job["data"]["digest"],
            "rows": 16,
            "tokens": sum(len(tokens(row)) for row in train),
            "trained_tokens": job["data"]["trained_tokens"],
            "truncated": 0,
            "validation_digest": job["data"]["validation_digest"],
            "validation_rows": 4,
            "validation_truncated": 0,
            "overlap": 0,
            "test_digest": None,
            "test_rows": 0,
            "test_overlap": 0,
            "split": 0,
            "dropped": 0,
            "lost_tokens": 0,
            "kinds": {"completion": 16},
        },
        "attempt": 0,
    }
    assert (await client.get(f"/train/{job['id']}")).json() == job
    assert (await client.get("/train")).json() == {"jobs": [job], "next": None}

    stored = JobData.load(tmp_path / "jobs" / job["id"])
    assert [list(example.token_ids) for example in stored.train] == [tokens(row) for row in train]
    assert stored.validation is not None
    assert [list(example.token_ids) for example in stored.validation] == [tokens(row) for row in validation]
    assert [reference.text for reference in stored.references] == [row["completion"] for row in validation]
    assert job["data"]["trained_tokens"] == sum(sum(example.is_target) for example in stored.train)
    assert not list(tmp_path.glob("jobs/.*"))


async def test_everything_said(client: httpx.AsyncClient) -> None:
    lora = {"rank": 8, "alpha": 16, "dropout": 0.1, "target_modules": ["v_proj", "q_proj"], "init": "olora"}
    training: dict[str, object] = {
        "epochs": 5,
        "max_steps": 7,
        "learning_rate": 0.01,
        "batch_size": 4,
        "max_length": 64,
    }
    training |= {"schedule": "linear", "warmup_ratio": 0.5, "weight_decay": 0.1, "max_grad_norm": 0.5, "seed": 3}
    training |= {"eval_steps": 2, "checkpoint_steps": 5, "early_stopping_patience": 2, "packing": False}
    training |= {"overlong": "refuse"}
    more = {
        "publish_if": "improves_base",
        "publish_metric": "exact_match",
        "alias": "prod",
        "description": "codes → phrases",
    }
    body = train_body(validation=0.25, lora=lora | {"use_rslora": True}, training=training, **more)
    job = (await client.post("/train", json=body)).json()
    assert job["config"] == {
        **CONFIG,
        **more,
        "lora": {
            **lora,
            "target_modules": ["q_proj", "v_proj"],
            "alpha": 16.0,
            "use_rslora": True,
            "init_std": 0.0625,
        },
        "training": training | {"auto_epochs": False},
        "dataset": None,
        "validation": 0.25,
        "test": 0,
    }
    assert job["progress"]["total_steps"] == 7
    assert job["data"]["validation_rows"] == 7


@pytest.mark.parametrize("given", [{}, {"alpha": None}])
@pytest.mark.parametrize(("rank", "use_rslora", "alpha"), [(1, False, 32.0), (256, False, 32.0), (4, True, 8.0)])
async def test_alpha_by_default(
    client: httpx.AsyncClient, given: dict[str, object], rank: int, use_rslora: bool, alpha: float
) -> None:
    lora = {"rank": rank, "use_rslora": use_rslora, **given}
    job = (await client.post("/train", json=train_body(lora=lora))).json()
    assert job["config"]["lora"] == {**CONFIG["lora"], "rank": rank, "use_rslora": use_rslora, "alpha": alpha}


async def test_full_has_its_own_rate(client: httpx.AsyncClient) -> None:
    job = (await client.post("/train", json=train_body(method="full"))).json()
    assert job["config"]["training"]["learning_rate"] == 3e-5


@pytest.mark.parametrize(
    ("count", "validation", "expected"),
    [(19, None, 0), (20, None, 4), (20, 0, 0), (20, 0.5, 13), (5, 0.01, 1), (20, ROWS[:3], 3)],
)
async def test_what_is_held_out(client: httpx.AsyncClient, count: int, validation: object, expected: int) -> None:
    body = train_body(data=ROWS[:count]) | ({} if validation is None else {"validation": validation})
    data = (await client.post("/train", json=body)).json()["data"]
    assert data["validation_rows"] == expected
    assert data["rows"] == (count if isinstance(validation, list) else count - expected)
    assert data["overlap"] == (3 if isinstance(validation, list) else 0)
    assert (data["validation_digest"] is None) == (expected == 0)


@pytest.mark.parametrize(
    ("given", "expected", "overlap"),
    [({}, 0, 0), ({"test": 0.5}, 7, 0), ({"test": 0.5, "validation": ROWS[:3]}, 7, 0), ({"test": ROWS[:3]}, 3, 3)],
)
async def test_what_is_set_aside_for_the_end(
    client: httpx.AsyncClient, given: dict[str, object], expected: int, overlap: int, tmp_path: Path
) -> None:
    """A share is disjoint from both other parts, and leaves a share for validation as it is."""
    job = (await client.post("/train", json=train_body(data=ROWS[:20], **given))).json()
    data, test = job["data"], given.get("test", 0)
    assert (data["test_rows"], data["test_overlap"]) == (expected, overlap)
    assert job["config"]["test"] == ("rows" if isinstance(test, list) else test)
    stored = JobData.load(tmp_path / "jobs" / job["id"])
    parts = [stored.train, stored.validation or (), () if stored.test is None else stored.test.examples]
    assert [len(part) for part in parts] == [data["rows"], data["validation_rows"], expected]
    rows = [tuple(example.token_ids) for part in parts for example in part]
    assert len(set(rows)) == 20 if overlap == 0 else len(rows) == 23
    without = (await client.post("/train", json=train_body(data=ROWS[:20], **{**given, "test": 0}))).json()["data"]
    assert data["validation_digest"] == without["validation_digest"]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (True, "a share to hold out, rows, or a data set's id"),
        (1, "at least 0 and below 1"),
        ([], "has no rows"),
        (0.95, "must be below 1 together"),
    ],
)
async def test_an_invalid_part_for_the_end(client: httpx.AsyncClient, test: object, message: str) -> None:
    response = await client.post("/train", json=train_body(test=test))
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["loc"] == ["test"]
    assert message in error["message"]


async def test_data_sets_instead_of_rows(client: httpx.AsyncClient) -> None:
    ids = []
    for rows in (ROWS[:12], ROWS[10:15]):
        content = "\n".join(map(json.dumps, rows)).encode()
        ids.append((await client.post("/datasets", files={"file": ("a.jsonl", content)})).json()["id"])
    job = (await client.post("/train", json=train_body(data=None, dataset=ids[0], validation=ids[1]))).json()
    assert (job["data"]["rows"], job["data"]["validation_rows"], job["data"]["overlap"]) == (12, 5, 2)
    assert (job["config"]["dataset"], job["config"]["validation"]) == (ids[0], ids[1])
    inline = (await client.post("/train", json=train_body(data=ROWS[:12], validation=ROWS[10:15]))).json()
    assert inline["data"] == job["data"]
    body = train_body(data=None, dataset=ids[0], test=ids[1], validation=0)
    tested = (await client.post("/train", json=body)).json()
    assert tested["data"]["test_digest"] == job["data"]["validation_digest"]
    assert (tested["data"]["test_rows"], tested["data"]["test_overlap"]) == (5, 2)
    assert (await client.delete(f"/datasets/{ids[1]}")).status_code == 409


@pytest.mark.parametrize("field", ["dataset", "validation"])
async def test_no_such_data_set(client: httpx.AsyncClient, field: str, tmp_path: Path) -> None:
    fields: dict[str, object] = {"data": None} if field == "dataset" else {}
    response = await client.post("/train", json=train_body(**fields) | {field: "ds-" + "0" * 32})
    assert response.status_code == 404
    assert response.json()["detail"].startswith(field)
    assert not list(tmp_path.glob("jobs/*"))


async def test_a_repeat_returns_the_first_job(client: httpx.AsyncClient, tmp_path: Path) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await client.post("/train", json=train_body(), headers=headers)
    again = await client.post("/train", json=train_body(method="lora", validation=None), headers=headers)
    assert again.status_code == 202
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    other = await client.post("/train", json=train_body(name="other"), headers=headers)
    assert other.status_code == 422
    assert other.json()["errors"][0]["loc"] == ["Idempotency-Key"]
    assert (await client.post("/train", json=train_body())).json()["id"] != first.json()["id"]
    assert len(list(tmp_path.glob("jobs/*"))) == 2


async def test_a_page_begins_after_a_job_that_there_is(client: httpx.AsyncClient) -> None:
    """An empty page would say that there are no older ones."""
    ids = [(await client.post("/train", json=train_body())).json()["id"] for _ in range(2)]
    page = (await client.get(f"/train?after={ids[1]}")).json()
    assert [job["id"] for job in page["jobs"]] == ids[:1]
    response = await client.get("/train?after=job-0000000000000000")
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["after"]


async def test_a_key_is_not_for_dry_runs(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once"}
    for _ in range(2):
        response = await client.post("/train?dry_run=true", json=train_body(), headers=headers)
        assert response.status_code == 200
    assert (await client.post("/train", json=train_body(name="other"), headers=headers)).status_code == 202


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_keys_have_bounds(client: httpx.AsyncClient, key: str) -> None:
    response = await client.post("/train", json=train_body(), headers={"Idempotency-Key": key})
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["Idempotency-Key"]


async def test_a_dry_run(client: httpx.AsyncClient, tmp_path: Path) -> None:
    long = {"prompt": "404 ", "completion": "Not Found " * 20}
    body = train_body(data=[*ROWS[:4], long], training={"max_length": 16, "batch_size": 2})
    response = await client.post("/train?dry_run=true", json=body)
    assert response.status_code == 200
    answer = response.json()
    assert answer["dry_run"] is True
    assert (answer["steps"], answer["config"]["training"]["epochs"]) == (20 * 3, 20)
    assert (answer["data"]["rows"], answer["data"]["truncated"]) == (5, 1)
    assert answer["data"]["tokens"] == sum(len(tokens(row)) for row in ROWS[:4]) + 16
    assert answer["estimate"]["seconds"] == pytest.approx(
        20 * answer["data"]["tokens"] / answer["estimate"]["tokens_per_second"]
    )
    assert answer["estimate"]["basis"] == "a matrix product"
    assert [row["row"] for row in answer["preview"]] == [0, 1, 2]
    for row, shown in zip(ROWS, answer["preview"], strict=False):
        assert shown["more"] == 0
        texts = {
            trained: "".join(token["text"] for token in shown["tokens"] if token["trained"] is trained)
            for trained in (False, True)
        }
        assert texts == {False: row["prompt"], True: f"{row['completion']}<|im_end|>"}
    assert answer["config"]["training"]["max_length"] == 16
    assert answer["data"]["kinds"] == {"completion": 5}
    assert (await client.get("/train")).json()["jobs"] == []
    assert not list(tmp_path.glob("jobs/*"))


async def test_a_dry_run_counts_what_happens_to_long_rows(client: httpx.AsyncClient) -> None:
    """A document was cut after its first 512 tokens without a warning, and an overlong prompt refused all rows."""
    document, prompt = {"text": "404 Not Found " * 200}, {"prompt": "404 " * 100, "completion": "Not Found"}
    body = train_body(data=[*ROWS[:3], document, prompt], training={"max_length": 64, "batch_size": 2})
    answer = (await client.post("/train?dry_run=true", json=body)).json()
    data = answer["data"]
    num_windows = data["rows"] - 3
    assert (data["truncated"], data["split"], data["dropped"]) == (0, 1, 1)
    assert data["lost_tokens"] == len(tokens(prompt))
    assert num_windows > 5
    limit, num_lost = "training.max_length (64 tokens)", len(tokens(prompt))
    assert answer["warnings"] == [
        f"1 row dropped as too long for {limit}: {num_lost} tokens lost",
        f"1 row longer than {limit} split into {num_windows} windows; each counts as a row",
    ]
    assert answer["steps"] == answer["config"]["training"]["epochs"] * -(-data["rows"] // 2)

    job = (await client.post("/train", json=body)).json()
    assert job["data"] == data
    events = (await client.get(f"/train/{job['id']}/events")).json()
    assert [event["message"] for event in events if event["level"] == "warning"] == answer["warnings"]


@pytest.mark.parametrize("validation", [0, [ROWS[0]]])
async def test_rows_that_are_all_too_long_are_refused(client: httpx.AsyncClient, validation: object) -> None:
    rows = [{"prompt": f"{number} " * 40, "completion": "b"} for number in range(100, 103)]
    data, validation = (rows, validation) if validation == 0 else (ROWS, rows)
    body = train_body(data=data, validation=validation, training={"max_length": 16})
    for route in ("/train", "/train?dry_run=true"):
        response = await client.post(route, json=body)
        assert response.status_code == 422
        (error,) = response.json()["errors"]
        assert error["loc"] == (["data"] if data is rows else ["validation"])
        assert error["message"].endswith("is dropped as longer than training.max_length (16 tokens): raise it")


async def test_a_dry_run_reads_on_if_its_sample_is_dropped(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "DRY_RUN_BYTES", 20)
    rows = [{"prompt": "404 " * 40, "completion": "Not Found"}, *ROWS[:3]]
    answer = (
        await client.post("/train?dry_run=true", json=train_body(data=rows, training={"max_length": 16}))
    ).json()
    assert (answer["data"]["rows"], answer["data"]["dropped"]) == (3, 1)


async def test_a_dry_run_recognizes_facts(client: httpx.AsyncClient) -> None:
    """Rows that can't be known from others, so that the held-out loss says little."""
    answer = (await client.post("/train?dry_run=true", json=train_body())).json()
    assert answer["facts"] is True
    (warning,) = answer["warnings"]
    assert warning.startswith("the rows look like facts")
    assert "recall" in warning
    none_held_out = (await client.post("/train?dry_run=true", json=train_body(validation=0))).json()
    assert (none_held_out["facts"], none_held_out["warnings"]) == (True, [])
    labels = [
        {"prompt": f"{row['prompt']}", "completion": " error" if number % 2 else " fine"}
        for number, row in enumerate(ROWS)
    ]
    answer = (await client.post("/train?dry_run=true", json=train_body(data=labels))).json()
    assert (answer["facts"], answer["warnings"]) == (False, [])


async def test_other_trainers_rows_without_an_answer_are_dropped(client: httpx.AsyncClient) -> None:
    empty, full = ({"instruction": "Add 1.", "output": output} for output in ("", "2"))
    answer = (await client.post("/train?dry_run=true", json=train_body(data=[empty, full]))).json()
    assert answer["data"]["rows"] == 1
    assert "1 row dropped, since the last answer is empty" in answer["warnings"]
    content = "\n".join(map(json.dumps, (empty, full)))
    uploaded = (await client.post("/datasets", files={"file": ("a.jsonl", content)})).json()
    assert (uploaded["rows"], uploaded["warnings"]) == (1, answer["warnings"])

    nothing = await client.post("/train?dry_run=true", json=train_body(data=[empty]))
    assert (nothing.status_code, nothing.json()["errors"][0]["loc"]) == (422, ["data"])
    nothing = await client.post("/datasets", files={"file": ("a.jsonl", json.dumps(empty))})
    assert nothing.status_code == 422


async def test_a_dry_run_reports_the_mapping(client: httpx.AsyncClient) -> None:
    rows = [{"instruction": "Add.", "input": "1 + 1", "output": "2"}]
    turns = [{"role": "user", "content": "Add.\n\n1 + 1"}, {"role": "assistant", "content": "2"}]
    answer = (await client.post("/train?dry_run=true", json=train_body(data=rows))).json()
    assert answer["mapping"] == "alpaca"
    (warning,) = answer["warnings"]
    assert warning.startswith("rows were read as Alpaca's")
    ours = (await client.post("/train?dry_run=true", json=train_body(data=[{"messages": turns}]))).json()
    assert (ours["mapping"], ours["data"]) == (None, answer["data"])

    content = json.dumps(rows[0]).encode()
    uploaded = (await client.post("/datasets", files={"file": ("a.jsonl", content)})).json()
    assert uploaded["warnings"] == [warning]
    assert uploaded["kinds"] == {"messages": 1}
    stored = await client.post("/train?dry_run=true", json=train_body(data=None, dataset=uploaded["id"]))
    assert (stored.json()["mapping"], stored.json()["data"]) == ("alpaca", answer["data"])


async def test_added_rows_move_no_row_to_the_other_side(client: httpx.AsyncClient) -> None:
    """Rows that one version was trained on must not be held out for the next."""
    kept = []
    more: list[dict[str, object]] = [{"prompt": f"{number} ", "completion": "?"} for number in range(20)]
    for rows in (ROWS, [*ROWS, *more]):
        job = (await client.post("/train", json=train_body(data=rows))).json()
        expected = held_out(rows, 0.1)
        assert job["data"]["validation_rows"] == len(expected)
        kept.append([row for row in expected if row in ROWS])
    assert kept[0] == kept[1]


async def test_epochs_that_are_given_are_kept(client: httpx.AsyncClient) -> None:
    job = (await client.post("/train", json=train_body(training={"epochs": 2}))).json()
    training = job["config"]["training"]
    assert (training["epochs"], training["auto_epochs"], job["progress"]["total_steps"]) == (2, False, 4)
    job = (await client.post("/train", json=train_body(training={"max_steps": 5}))).json()
    assert job["progress"]["total_steps"] == 5


async def test_a_dry_run_samples_held_out_rows_first(client: httpx.AsyncClient) -> None:
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    chat = {"messages": [*turns, {"role": "assistant", "content": "Found"}]}
    long = {"prompt": "404 ", "completion": "Not Found" * 1000}
    held_out = [{"prompt": "200 ", "completion": "OK"}]
    body = train_body(data=[{"text": "a text"}, long, chat, *ROWS], validation=held_out)
    answer = (await client.post("/train?dry_run=true", json=body)).json()
    chat_sample = {"held_out": False, "messages": turns, "completion": "Found"}
    samples = [{"held_out": True, **held_out[0]}, chat_sample, *({"held_out": False, **row} for row in ROWS)]
    assert answer["samples"] == samples[:6]
    assert answer["data"]["kinds"] == {"completion": 1 + len(ROWS), "messages": 1, "text": 1}


async def test_a_dry_run_tokenizes_a_sample_and_scales_its_counts(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"row {number:03}"} for number in range(200)]
    training = {"epochs": 2, "batch_size": 10, "max_length": 4, "overlong": "truncate"}
    cut = "200 rows cut at training.max_length (4 tokens): 600 tokens lost"
    body = train_body(data=rows, validation=0.25, training=training)
    whole = (await client.post("/train?dry_run=true", json=body)).json()
    encoded: list[object] = []
    encode = RowEncoder._fitted

    def noting(self: RowEncoder, row: Row, max_length: int, overlong: Overlong) -> object:
        encoded.append(row)
        return encode(self, row, max_length, overlong)

    monkeypatch.setattr(RowEncoder, "_fitted", noting)
    monkeypatch.setattr(train, "DRY_RUN_BYTES", 70)
    sampled = (await client.post("/train?dry_run=true", json=body)).json()
    assert len(encoded) == 10 + 10  # 7 bytes each
    assert sampled["warnings"] == [cut, "only 20 of 200 rows were tokenized: counts of tokens are estimates"]
    assert whole["warnings"] == [cut]
    assert {"rows": 152, "validation_rows": 48, "truncated": 152}.items() <= whole["data"].items()
    assert sampled["data"] == whole["data"]  # since all rows have as many tokens
    assert (sampled["steps"], sampled["preview"]) == (whole["steps"], whole["preview"]) == (32, whole["preview"])
    for answer in (sampled, whole):
        estimate = answer["estimate"]
        passes = 2 * answer["data"]["tokens"] + 2 * 48 * 4 / 2
        assert estimate["seconds"] == pytest.approx(passes / estimate["tokens_per_second"])


async def test_an_estimate_from_an_earlier_job(client: httpx.AsyncClient, leases: Leases) -> None:
    await submit(client)
    StandIn(leases).succeed()
    response = await client.post("/train?dry_run=true", json=train_body(validation=0.5))
    answer = response.json()
    data, estimate = answer["data"], answer["estimate"]
    assert (estimate["tokens_per_second"], estimate["basis"]) == (250.0, "an earlier job")
    # twenty epochs, and the held-out rows twice, at twice the speed
    num_held_out = sum(len(tokens(row)) for row in held_out(ROWS, 0.5))
    assert estimate["seconds"] == pytest.approx(20 * data["tokens"] / 250 + 2 * num_held_out / 500)
    full = await client.post("/train?dry_run=true", json=train_body(method="full"))
    assert full.json()["estimate"]["basis"] == "a matrix product"


async def test_going_on_from_an_adapter(client: httpx.AsyncClient) -> None:
    version = (await client.post("/adapters/up", files=as_parts(*peft_files(rank=4)))).json()
    job = (await client.post("/train", json=train_body(start_from="up"))).json()
    await client.post("/adapters/up", files=as_parts(*peft_files(seed=1, rank=2)))
    config = job["config"]
    assert (config["start_from"], config["start_from_digest"]) == ("up@1", version["digest"])
    assert config["lora"] == {
        **CONFIG["lora"],
        "rank": 4,
        "alpha": 8.0,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    }
    later = (await client.post("/train", json=train_body(start_from="up@latest"))).json()
    assert later["config"]["start_from"] == "up@2"
    same = train_body(start_from="up@1", lora={"rank": 4, "alpha": None, "dropout": 0.5})
    assert (await client.post("/train", json=same)).status_code == 202
    other = await client.post("/train", json=train_body(start_from="up@1", lora={"rank": 16}))
    assert other.status_code == 422
    assert other.json()["errors"][0]["loc"] == ["lora", "rank"]
    for name in ("base", "tiny-llama"):
        base = (await client.post("/train", json=train_body(start_from=name))).json()
        assert base["config"]["start_from"] is None


@pytest.mark.parametrize("start_from", ["nobody", "up@2", "up@prod"])
async def test_no_such_parent(client: httpx.AsyncClient, start_from: str) -> None:
    await client.post("/adapters/up", files=as_parts(*peft_files()))
    response = await client.post("/train", json=train_body(start_from=start_from))
    assert response.status_code == 404
    assert start_from in response.json()["detail"]


async def test_a_parent_in_use_stays(client: httpx.AsyncClient, leases: Leases) -> None:
    for seed in range(2):
        await client.post("/adapters/up", files=as_parts(*peft_files(seed)))
    job_id = await submit(client, start_from="up@1")
    for path in ("/adapters/up", "/adapters/up/1"):
        response = await client.delete(path)
        assert response.status_code == 409
        assert "up@1" in response.json()["detail"]
    assert (await client.delete("/adapters/up/2")).status_code == 204
    assert (await client.post(f"/train/{job_id}/cancel")).status_code == 200
    assert (await client.delete("/adapters/up")).status_code == 204


async def test_data_beyond_a_body_goes_through_datasets(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    response = await client.post("/train", content=b" " * ((2 << 20) + 1), headers=headers)
    assert response.status_code == 413
    assert "/datasets" in response.json()["detail"]


async def test_as_many_jobs_as_may_wait(client: httpx.AsyncClient, tmp_path: Path) -> None:
    for _ in range(20):
        await submit(client)
    response = await client.post("/train", json=train_body())
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert len(list(tmp_path.glob("jobs/*"))) == 20
