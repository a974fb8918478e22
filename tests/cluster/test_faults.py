"""Killed replicas and API processes cause no wrong answers and leave nothing behind."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import needs_ray
from tests.cluster.kit import Cluster, wait_until
from tests.end_to_end.server_process import ServerProcess

pytestmark = [pytest.mark.cluster, needs_ray]

NUM = 12


@pytest.fixture
def two(cluster: Cluster, api: ServerProcess, single: ServerProcess) -> Iterator[ServerProcess]:
    """Yield the API process once it knows both replicas; restore two replicas afterwards."""
    spread(api, single)
    yield api
    for process in cluster.replicas():
        process.send_signal(signal.SIGCONT)
    wait_until(lambda: len(cluster.replicas()) == 2, "it was not replaced")


def spread(api: ServerProcess, single: ServerProcess, num: int = 2) -> None:
    """Wait until the API process knows exactly `num` replicas."""
    blocks = single.metrics()["smolora_kv_blocks"]
    wait_until(lambda: api.metrics()["smolora_kv_blocks"] == num * blocks, "the number of replicas is another")


def streamed(server: ServerProcess, body: dict[str, Any], begun: threading.Semaphore) -> tuple[str, Any]:
    """Return the text of a stream, and the problem that ended it, if any."""
    text = ""
    with server.client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        for line in lines:
            if line.startswith("event: error"):
                return text, json.loads(next(lines).removeprefix("data: "))
            if line.startswith("data: {"):
                if not text:
                    begun.release()
                text += json.loads(line.removeprefix("data: ")).get("text", "")
    return text, None


def test_replica_dies_before_its_first_message(
    two: ServerProcess, single: ServerProcess, cluster: Cluster
) -> None:
    prompts = [f"{number} before the first token" for number in range(NUM)]
    expected = single.texts(prompts, max_tokens=30, adapter="left*0.5", seed=5, temperature=0.8)
    victim = cluster.replicas()[0]
    victim.send_signal(signal.SIGSTOP)  # requests sent to it get no answer
    with ThreadPoolExecutor(NUM) as pool:
        asked = pool.map(
            lambda p: two.text(p, max_tokens=30, adapter="left*0.5", seed=5, temperature=0.8), prompts
        )
        time.sleep(1.5)
        victim.kill()
        assert list(asked) == expected
    wait_until(lambda: victim.pid not in [process.pid for process in cluster.replicas()])


def test_no_answer_fails_if_a_replica_dies_during_answers(
    two: ServerProcess, single: ServerProcess, cluster: Cluster
) -> None:
    """The other replica goes on with streams, and with answers that aren't streamed, to the same bits."""
    bodies: list[dict[str, Any]] = [
        {"prompt": f"{number} in the middle", "max_tokens": 700, "temperature": 0} for number in range(NUM)
    ]
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(2 * NUM) as pool:
        asked = [pool.submit(streamed, two, body, begun) for body in bodies]
        wholes = [pool.submit(two.text, **body) for body in bodies]
        for _ in range(NUM):
            assert begun.acquire(timeout=60)
        cluster.replicas()[0].kill()
        found = [ask.result() for ask in asked]
        texts = [whole.result() for whole in wholes]
    expected = single.texts([str(body["prompt"]) for body in bodies], max_tokens=700)
    assert found == [(text, None) for text in expected]
    assert texts == expected


def test_api_process_dies_during_answers(two: ServerProcess, cluster: Cluster, tmp_path: Path) -> None:
    other = cluster.api(tmp_path / "other")
    begun = threading.Semaphore(0)
    body = {"prompt": "Nobody reads this to its end", "max_tokens": 3500, "temperature": 0, "n": 4}

    def ask(number: int) -> None:
        with pytest.raises(Exception, match=r"peer|disconnected|closed|reset"):
            streamed(other, {**body, "prompt": f"{number} {body['prompt']}"}, begun)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, number) for number in range(4)]
        for _ in range(4):
            assert begun.acquire(timeout=60)
        two.wait_for(requests_running=16)
        other.kill()
        killed = time.monotonic()
        two.wait_for(requests_running=0, kv_blocks_used=0)
        assert time.monotonic() - killed < 3
        for each in asked:
            each.result()
    other.close()


def test_hanging_replica_is_replaced(two: ServerProcess, cluster: Cluster) -> None:
    victim = cluster.replicas()[0]
    victim.send_signal(signal.SIGSTOP)
    wait_until(lambda: victim.pid not in [process.pid for process in cluster.replicas()], "it stays", 90)
    assert two.text("It goes on", max_tokens=4) is not None


def test_only_replica_dies(two: ServerProcess, single: ServerProcess, cluster: Cluster) -> None:
    """Accepted requests wait for its replacement."""
    cluster.scale(1)
    wait_until(lambda: len(cluster.replicas()) == 1)
    spread(two, single, 1)
    (victim,) = cluster.replicas()
    victim.send_signal(signal.SIGSTOP)
    prompts = [f"{number} waits for a new one" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        asked = pool.map(lambda prompt: two.text(prompt, max_tokens=20), prompts)
        time.sleep(1)
        victim.kill()
        time.sleep(1)
        assert two.client.get("/ready").status_code == 503
        refused = two.client.post("/generate", json={"prompt": "x"})
        assert (refused.status_code, refused.headers.get("Retry-After")) == (503, "5")
        assert list(asked) == single.texts(prompts, max_tokens=20)
    cluster.scale(2)
