"""Clients that repeat a request and record every wrong answer."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from tests.cluster.kit import wait_until
from tests.end_to_end.server_process import PATIENCE, ServerProcess

NUM = 6
MAX_TOKENS = 80


@dataclass
class Load:
    """The answers so far."""

    faults: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of right answers

    def wait_for(self, num: int) -> None:
        """Wait for more right answers."""
        before = len(self.times)
        wait_until(lambda: len(self.times) >= before + num, f"nothing is answered: {self.faults[:3]}")


@contextmanager
def load_on(urls: Sequence[str], single: ServerProcess, num: int = NUM) -> Iterator[Load]:
    """Run streams of requests during the block, each to the URLs in turn, as from a load balancer.

    A URL that refuses connections or returns 503 is skipped, as by any load balancer; if all do, that is a fault.
    `single` has the right answers.
    """
    prompts = [f"{number} while machines come and go" for number in range(num)]
    expected = single.texts(prompts, max_tokens=MAX_TOKENS)
    load, stop = Load(), threading.Event()

    def go_on(index: int) -> None:
        with httpx.Client(timeout=PATIENCE, trust_env=False) as client:
            turn = itertools.count(index)
            while not stop.is_set():
                found = _answer(client, urls, next(turn), prompts[index])
                if found == expected[index]:
                    load.times.append(time.monotonic())
                else:
                    load.faults.append(found)

    threads = [threading.Thread(target=go_on, args=(index,)) for index in range(num)]
    for thread in threads:
        thread.start()
    try:
        load.wait_for(num)
        yield load
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _answer(client: httpx.Client, urls: Sequence[str], turn: int, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    found = ""
    for shift in range(len(urls)):
        try:
            response = client.post(f"{urls[(turn + shift) % len(urls)]}/generate", json=body)
        except httpx.ConnectError as error:
            found = f"{type(error).__name__} {error}"
            continue
        except httpx.TransportError as error:  # it accepted the request and never answered
            return f"{type(error).__name__} {error}"
        if response.status_code == 200:
            return str(response.json()["choices"][0]["text"])
        found = f"{response.status_code} {response.text}"
        if response.status_code != 503 or len(urls) == 1:
            break
    return found
