"""An API process with Ray Serve gives the same answers as a single process, bit for bit."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import needs_ray
from tests.cluster.kit import Cluster, error_of
from tests.end_to_end.server_process import ServerProcess, events

pytestmark = [pytest.mark.cluster, needs_ray]

_numbers = count()
SCHEMA = {"type": "object", "properties": {"code": {"type": "integer"}}, "required": ["code"]}
BODIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 7, "top_p": 0.95},
    "choices": {"temperature": 0.9, "seed": 8, "n": 3},
    "adapter": {"temperature": 0, "adapter": "left*2"},
    "blend": {"temperature": 0.7, "seed": 9, "adapter": "left*1.5+right*-0.5"},
    "logprobs": {"temperature": 0.7, "seed": 10, "logprobs": 5, "adapter": "third"},
    "penalties": {"temperature": 0.7, "seed": 11, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    "regex": {"temperature": 0.7, "seed": 12, "regex": "[a-z]{3} [0-9]+"},
    "choice": {"temperature": 0.7, "seed": 13, "structured_outputs": {"choice": ["yes", "no", "not sure"]}},
    "ends": {"temperature": 0.9, "seed": 14, "min_tokens": 20, "stop_token_ids": list(range(3, 60)), "stop": "a"},
    "scores": {"temperature": 0.7, "seed": 15, "prompt_logprobs": 2, "adapter": "left"},
    "scores alone": {"max_tokens": 0, "prompt_logprobs": 0},
}


def answer(server: ServerProcess, body: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return what must be equal: choices, scores and counts."""
    return compared(server.client.post("/generate", json=body))


def compared(response: httpx.Response) -> tuple[Any, Any, Any]:
    """Return the parts of an answer that `answer` returns."""
    assert response.status_code == 200, response.text
    found = response.json()
    return found["choices"], found.get("prompt_logprobs"), found["usage"]


@pytest.mark.parametrize("kind", BODIES)
def test_answers_are_those_of_one_process(api: ServerProcess, single: ServerProcess, kind: str) -> None:
    body = {"prompt": f"{next(_numbers)} {kind}: 404 Not Found means", "max_tokens": 24, **BODIES[kind]}
    assert answer(api, body) == answer(single, body)


def test_scores_equal_the_single_processs(api: ServerProcess, single: ServerProcess) -> None:
    body = {"candidates": ["base", "left"], "prompt": "502 Bad", "completion": " Gateway"}
    first, second = (server.client.post("/compare", json=body) for server in (api, single))
    assert first.status_code == second.status_code
    if first.status_code == 200:
        assert first.json()["candidates"] == second.json()["candidates"]


QUESTIONS = [
    {"type": "predicate", "instructions": "Is it an error?"},
    {
        "type": "choice",
        "instructions": "",
        "choices": [{"value": value} for value in ("Gateway", "Gateway Timeout", True)],
    },
]


def test_decisions_equal_the_single_processs(api: ServerProcess, single: ServerProcess) -> None:
    """One question about one input: several would be one batch in one process, and two on two replicas.

    Torch's last bits depend on the batch. `test_real_base.py` compares several with native code, whose bits don't.
    """
    body = {"adapter": "left*0.5", "input": "502 Bad", "questions": QUESTIONS[1:]}
    first, second = (server.client.post("/decide", json=body) for server in (api, single))
    assert first.status_code == second.status_code == 200, first.text
    assert first.json()["results"] == second.json()["results"]


def test_a_stream_is_the_answer_in_pieces(api: ServerProcess, single: ServerProcess) -> None:
    body: dict[str, Any] = {"prompt": "A stream: 500", "max_tokens": 40, "temperature": 0, "adapter": "right"}
    (choice,), *_ = answer(single, body)
    with api.stream(**body) as pieces:
        found = list(pieces)
    assert "".join(piece.get("text", "") for piece in found) == choice["text"]
    assert len(found) > 20  # one by one, not all at once


def test_many_concurrent_requests(api: ServerProcess, single: ServerProcess) -> None:
    prompts = [f"{number} is a code that says" for number in range(24)]
    assert api.texts(prompts, max_tokens=60, adapter="left") == single.texts(
        prompts, max_tokens=60, adapter="left"
    )


def test_closed_stream_frees_its_place(api: ServerProcess) -> None:
    body = {"prompt": "A long one", "max_tokens": 3500, "temperature": 0, "stream": True, "n": 4}
    with api.client.stream("POST", "/generate", json=body) as response:
        next(events(response.iter_lines()))
        api.wait_for(requests_running=4)
    started = time.monotonic()
    api.wait_for(requests_running=0, requests_waiting=0, kv_blocks_used=0)
    assert time.monotonic() - started < 3  # much earlier than it would have ended


def test_refusals_reach_the_client(api: ServerProcess, single: ServerProcess) -> None:
    for body in (
        {"prompt": "x", "max_tokens": 4096},
        {"prompt": "x", "logit_bias": {"100000": 1}},
        {"prompt": "x", "adapter": "nobody"},
        {"prompt": "x", "regex": "(?<=a)b"},
        {"prompt": ""},
    ):
        mine, theirs = (server.client.post("/generate", json=body) for server in (api, single))
        assert error_of(mine) == error_of(theirs)
        assert mine.status_code in (404, 422)


def test_full_queue_returns_retry_after(api: ServerProcess) -> None:
    body = {"prompt": "Full", "max_tokens": 600, "temperature": 0, "ignore_eos": True}
    together = threading.Barrier(90)  # otherwise a fast machine would answer some before all are sent

    def ask(number: int) -> tuple[int, str | None]:
        together.wait()
        response = api.client.post("/generate", json={**body, "prompt": f"{number} full"})
        return response.status_code, response.headers.get("Retry-After")

    with ThreadPoolExecutor(90) as pool:
        found = list(pool.map(ask, range(90)))  # two replicas have 16 places each, and 16 may wait
    codes = {code for code, _ in found}
    assert codes == {200, 429}
    assert all(after is not None for code, after in found if code == 429)
    assert sum(code == 200 for code, _ in found) >= 48
    api.wait_until_idle()


def test_repeated_prompt_goes_to_the_replica_with_its_blocks(api: ServerProcess) -> None:
    prompt = "A prompt of several blocks, which one of the replicas has in its cache after the first time. " * 3
    first = api.generate(prompt, max_tokens=2, adapter="left")
    assert first["usage"]["cached_tokens"] == 0
    for number in range(6):
        again = api.generate(f"{prompt}{number}", max_tokens=2, adapter="left")
        assert again["usage"]["cached_tokens"] > 32


def test_readiness_and_metrics_cover_all_replicas(api: ServerProcess, cluster: Cluster) -> None:
    assert api.client.get("/ready").json()["model"] == "tiny-llama"
    assert len(cluster.replicas()) == 2
    api.generate("Count", max_tokens=2)
    assert api.counts()["smolora_engine_steps_total"] > 0
