"""PostgreSQL, an object store, replicas, API processes and workers together: every API process sees the same
state."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.cluster.conftest import needs_ray
from tests.cluster.kit import publish, wait_until
from tests.cluster.test_answers import BODIES
from tests.cluster.whole import Whole
from tests.end_to_end.server_process import PATIENCE, ServerProcess
from tests.end_to_end.training_client import ENDED, code_rows
from tests.kits.buckets import aws_variables
from tests.kits.postgres import CLUSTER

pytestmark = [*CLUSTER, needs_ray]

_numbers = count(1)
SILENT_SECONDS = 3.0
"""Seconds without news after which a process polls: see `server.database.postgres`."""


class InTurn(httpx.BaseTransport):
    """A client whose requests go to the API processes in turn."""

    def __init__(self, urls: list[str]) -> None:
        self._next = cycle([httpx.URL(url) for url in urls])
        self._transport = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        place = next(self._next)
        request.url = request.url.copy_with(port=place.port)
        return self._transport.handle_request(request)

    def close(self) -> None:
        self._transport.close()


@pytest.fixture
def client(whole: Whole) -> Iterator[httpx.Client]:
    """Yield a client of both API processes, in turn."""
    headers = {"Authorization": f"Bearer {whole.operator}"}
    with httpx.Client(
        base_url=whole.urls[0], headers=headers, timeout=PATIENCE, transport=InTurn(whole.urls)
    ) as client:
        yield client


@pytest.fixture
def official(whole: Whole) -> Iterator[Callable[[], OpenAI]]:
    """Yield a function that connects the `openai` package to the next API process at each call."""
    clients = [
        OpenAI(base_url=f"{url}/v1", api_key=whole.operator, max_retries=0, timeout=PATIENCE) for url in whole.urls
    ]
    yield partial(next, cycle(clients))
    for client in clients:
        client.close()


def answer(client: httpx.Client, body: dict[str, Any]) -> tuple[Any, Any]:
    """Return what must be equal: choices and counts."""
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    return found["choices"], found["usage"]


@pytest.mark.parametrize("kind", BODIES)
def test_answers_are_those_of_one_process(client: httpx.Client, single: ServerProcess, kind: str) -> None:
    """No prompt is in a prefix cache: each begins differently."""
    for _ in range(2):  # one of each API process
        body = {"prompt": f"{next(_numbers)} whole {kind}: 404 Not Found", "max_tokens": 24, **BODIES[kind]}
        assert answer(client, body) == answer(single.client, body)


def test_adapter_published_through_one_process_is_used_through_another(
    whole: Whole, single: ServerProcess
) -> None:
    with whole.client(0) as first, whole.client(1) as second:
        for turn in range(6):
            publishing, using = (0, second) if turn % 2 == 0 else (1, first)
            publish(single, "handed", 100 + turn, whole.shape)
            body = {"prompt": f"{turn} handed over", "max_tokens": 16, "temperature": 0, "adapter": "handed"}
            assert whole.publish(publishing, "handed", 100 + turn).status_code == 201
            response = using.post("/generate", json=body)  # the very next request
            assert response.status_code == 200, response.text
            assert response.json()["adapters"][0]["version"] == turn + 1
            expected = single.client.post("/generate", json=body).json()
            assert response.json()["choices"] == expected["choices"]


def test_adapter_deleted_while_another_process_has_it_queued(
    whole: Whole, single: ServerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = publish(single, "doomed", 200, whole.shape)
    body = {"prompt": "It is still wanted", "max_tokens": 300, "temperature": 0, "adapter": "doomed*0.5"}
    expected = answer(single.client, body)
    assert whole.publish(0, "doomed", 200).status_code == 201  # no replica has loaded it
    full = {"prompt": "Full", "max_tokens": 900, "temperature": 1, "n": 16, "ignore_eos": True}
    with whole.client(0) as first, whole.client(1) as second, ThreadPoolExecutor(3) as pool:
        hogs = [pool.submit(second.post, "/generate", json=full) for _ in range(2)]
        wait_until(lambda: queue(second)["running"] == 32, "the replicas aren't full")
        asked = pool.submit(answer, second, body)
        wait_until(lambda: queue(second)["waiting"] == 1, "it isn't queued")
        assert first.delete("/adapters/doomed").status_code == 204
        assert queue(second)["waiting"] == 1
        for client in (second, first):  # in the very next requests
            assert client.post("/generate", json=body).status_code == 404
        assert asked.result() == expected
        assert {hog.result().status_code for hog in hogs} == {200}

    from adapters.storage.bucket import Bucket
    from adapters.store.bucket_store import BucketAdapterStore

    for name, value in aws_variables(whole.proxy.url).items():
        monkeypatch.setenv(name, value)
    bucket = Bucket.open(whole.bytes_url, allow_http=True).under("adapters")
    store = BucketAdapterStore(tmp_path, bucket)
    assert bucket.listed(f"bytes/{digest}/")
    assert store.sweep(lambda _: False) == []  # a request might still want it
    time.sleep(2)
    swept = BucketAdapterStore(tmp_path, bucket, grace=1).sweep(lambda wanted: wanted != digest)
    assert swept == [digest]
    assert bucket.listed(f"bytes/{digest}/") == []


def queue(client: httpx.Client) -> dict[str, float]:
    """Return the running and waiting sequences of all replicas."""
    lines = client.get("/metrics?all_replicas=true").text.splitlines()
    numbers = {
        name: [line.rpartition(" ")[2] for line in lines if line.startswith(f"smolora_requests_{name}{{")]
        for name in ("running", "waiting")
    }
    return {name: sum(map(float, found)) for name, found in numbers.items()}


def test_keys_count_everywhere(whole: Whole) -> None:
    """A new key works in the next request. Other processes see a revocation within milliseconds, not always before
    the next request."""
    for turn in range(10):
        with whole.client(turn % 2) as making, whole.client(1 - turn % 2) as other:
            made = making.post("/keys", json={"name": f"key-{turn}"}).json()
            headers = {"Authorization": f"Bearer {made['secret']}"}

            def answers(code: int, other: httpx.Client = other, headers: dict[str, str] = headers) -> bool:
                return other.get("/adapters", headers=headers).status_code == code

            assert answers(200)
            assert making.delete(f"/keys/{made['id']}").status_code == 200
            wait_until(partial(answers, 401), "it still opens", SILENT_SECONDS)


def test_rates_are_counted_together(whole: Whole, client: httpx.Client) -> None:
    limited = {"name": "limited", "requests_per_minute": 10}
    secret = client.post("/keys", json=limited).json()["secret"]
    headers = {"Authorization": f"Bearer {secret}"}

    def ask(number: int) -> int:
        return client.post("/generate", json={"prompt": "a", "max_tokens": 1}, headers=headers).status_code

    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(ask, range(16)))
    assert (codes.count(200), codes.count(429)) == (10, 6)


def test_official_client(official: Callable[[], OpenAI], single: ServerProcess) -> None:
    base = single.client.get("/ready").json()["model"]
    prompt = "The official client"
    for _ in range(2):
        said = official().completions.create(model="left*2", prompt=prompt, temperature=0, max_tokens=16)
        assert said.choices[0].text == single.text(prompt, max_tokens=16, adapter="left*2")
    streamed = list(
        official().completions.create(model=base, prompt=prompt, temperature=0, max_tokens=40, stream=True)
    )
    assert "".join(piece.choices[0].text for piece in streamed) == single.text(prompt, max_tokens=40)
    assert {"left", "right", "third"} <= {model.id for model in official().models.list()}
    with pytest.raises(openai.NotFoundError):
        official().completions.create(model="nobody", prompt=prompt)


def test_fine_tuning_with_the_official_client(official: Callable[[], OpenAI], single: ServerProcess) -> None:
    rows = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"].strip()}]
        for row in code_rows(12)
    ]
    content = "".join(json.dumps({"messages": turns_of}) + "\n" for turns_of in rows).encode()
    file = official().files.create(file=("codes.jsonl", content), purpose="fine-tune")
    assert official().files.content(file.id).read() == content  # from the other API process
    job = official().fine_tuning.jobs.create(
        model=single.client.get("/ready").json()["model"],
        training_file=file.id,
        suffix="tuned",
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
    )
    wait_until(lambda: official().fine_tuning.jobs.retrieve(job.id).status in ENDED, f"job {job.id}")
    for _ in range(2):
        done = official().fine_tuning.jobs.retrieve(job.id)
        assert (done.status, done.fine_tuned_model, done.error) == ("succeeded", "tuned@1", None)
    events = list(official().fine_tuning.jobs.list_events(job.id, limit=3))  # a page of each in turn
    assert events[0].message == "succeeded: tuned@1"
    assert sum(event.type == "metrics" for event in events) == 6
    (results,) = done.result_files
    assert official().files.content(results).text.startswith("step,")
    said = [
        official().chat.completions.create(
            model="tuned@1", messages=[{"role": "user", "content": "HTTP 404:"}], temperature=0, max_tokens=8
        )
        for _ in range(2)
    ]
    assert said[0].choices[0].message.content == said[1].choices[0].message.content
    assert {answer.model for answer in said} == {"tuned@1"}
    assert official().files.delete(file.id).deleted
