"""The greedy project: everything that has ever delayed another project, at once.

A process of its own runs the clients, at the lowest priority: they stand for other machines, and should take
processor time from the server as little as possible. Each activity has a fixed number of clients, which wait
`pause` seconds between two requests, so that a quick refusal doesn't make the load heavier.
"""

import multiprocessing
import os
import random
import select
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.end_to_end.training_client import code_rows

NICENESS = 19
MIB = 1 << 20
CONTEXT = 8000
"""Tokens of a long prompt, and of the streams that hold an adapter."""
REGEX = "([a-z ]*[de][a-z ]{9})+x"
WIDE, NARROW, UPLOADED = "wide", "narrow", "uploaded"
"""Names of adapters: one that fills the pool, one of another rank, and one that is uploaded again and again."""
DATASET_BYTES = 18_000_000
WAITING = "waiting"
"""The outcome of a request that the server has neither answered nor refused by the end."""
_WORDS = ["the", "harbour", "master", "wrote", "down", "name", "of", "every", "ship", "that", "came", "in"]
_REFUSED = "1" * (2 * MIB - 100)
_CONTAINERS = b'{"prompt":"x","z":[' + b"[]," * 699_000 + b"[]]}"
_NUM_SOCKETS = 100  # of a client that sends bodies by halves
_TIMEOUT = 300.0
_SOCKET_TIMEOUT = 5.0


@dataclass(frozen=True)
class Target:
    """What the clients need to know. `files` are an adapter's, to be uploaded; `dataset` is an id."""

    url: str
    secret: str
    dataset: str
    files: dict[str, tuple[str, bytes]]


@dataclass
class Greedy:
    """The clients of one process, and what they have achieved: outcomes by activity."""

    target: Target
    ends: threading.Event = field(default_factory=threading.Event)
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.client = httpx.Client(
            base_url=self.target.url,
            headers={"Authorization": f"Bearer {self.target.secret}"},
            timeout=_TIMEOUT,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )

    def count(self, activity: str, outcome: str, number: int = 1) -> None:
        with self.lock:
            self.counts[activity][outcome] += number

    def post(self, activity: str, path: str, **content: Any) -> httpx.Response:
        """Send a request. Count the answer's status; until it comes the request counts as waiting."""
        self.count(activity, WAITING)
        try:
            response = self.client.post(path, **content)
        finally:
            self.count(activity, WAITING, -1)
        self.count(activity, str(response.status_code))
        return response

    def stream(self, activity: str, **fields: object) -> None:
        """Read a stream to its end, and count its pieces of text."""
        body = {"temperature": 1.0, "stream": True, **fields}
        with self.client.stream("POST", "/generate", json=body) as response:
            self.count(activity, str(response.status_code))
            for line in response.iter_lines():
                if '"text"' in line:
                    self.count(activity, "pieces")
                if self.ends.is_set():
                    return

    def run(self, activity: "Activity", seed: int) -> None:
        """Do the activity again and again until the end, as one of its clients."""
        rng = random.Random(f"{activity.name} {seed}")
        while not self.ends.is_set():
            try:
                activity.work(self, rng)
            except (httpx.HTTPError, OSError) as error:
                self.count(activity.name, type(error).__name__)
            self.ends.wait(activity.pause)


@dataclass(frozen=True)
class Activity:
    """What some clients do again and again. At least `least` outcomes must be `wanted` ones."""

    name: str
    work: Callable[[Greedy, random.Random], None]
    num_clients: int
    pause: float
    wanted: frozenset[str]
    least: int


def hold_rows(greedy: Greedy, rng: random.Random) -> None:
    """Stream as long as possible under an adapter that fills the pool."""
    greedy.stream("rows", prompt=_text(rng, 5), adapter=WIDE, max_tokens=CONTEXT, ignore_eos=True)


def fill_batch(greedy: Greedy, rng: random.Random) -> None:
    greedy.stream("streams", prompt=_text(rng, 20), max_tokens=100, ignore_eos=True)


def send_long_prompt(greedy: Greedy, rng: random.Random) -> None:
    """A digit is a token."""
    digits = "".join(rng.choices("0123456789", k=CONTEXT))
    greedy.post("prompts", "/generate", json={"prompt": digits, "max_tokens": 1})


def send_too_long_prompt(greedy: Greedy, rng: random.Random) -> None:
    greedy.post("refused", "/generate", json={"prompt": _REFUSED})


def follow_regex(greedy: Greedy, rng: random.Random) -> None:
    """An accepted regex whose masks are costly to compute."""
    greedy.stream("regex", prompt=_text(rng, 10), regex=REGEX, max_tokens=100)


def send_grammar(greedy: Greedy, rng: random.Random) -> None:
    """A regex that is new and takes long to check."""
    number = rng.randrange(1 << 40)
    regex = f"{number}((a{{0,50}}b{{0,50}}){{0,50}}c?){{0,50}}"
    greedy.post("grammars", "/generate", json={"prompt": "a", "regex": regex, "max_tokens": 1})


def run_dry(greedy: Greedy, rng: random.Random) -> None:
    body = {"name": "dry", "dataset": greedy.target.dataset}
    greedy.post("dryruns", "/train?dry_run=true", json=body)


def ask_for_merge(greedy: Greedy, rng: random.Random) -> None:
    """Merging factors needs equal ranks, so the merge is refused."""
    body = {"expression": f"{WIDE}*0.5+{NARROW}*{rng.random():.6f}", "method": "ties"}
    greedy.post("merges", "/compositions/merged", json=body)


def upload(greedy: Greedy, rng: random.Random) -> None:
    """A version of an adapter, which is then deleted."""
    response = greedy.post("uploads", f"/adapters/{UPLOADED}", files=greedy.target.files)
    if response.status_code == 201:
        greedy.client.delete(f"/adapters/{UPLOADED}/{response.json()['version']}?force=true")


def send_containers(greedy: Greedy, rng: random.Random) -> None:
    """A refused body that parses to 700,000 containers."""
    headers = {"Content-Type": "application/json"}
    greedy.post("containers", "/generate", content=_CONTAINERS, headers=headers)


def hold_bodies(greedy: Greedy, rng: random.Random) -> None:
    """Send bodies of 2 MiB without their last bytes, and hold the connections until the server answers."""
    held: dict[int, socket.socket] = {}
    poll = select.poll()
    try:
        while not greedy.ends.is_set():
            if len(held) < _NUM_SOCKETS:
                try:
                    connection = _half_sent(greedy.target)
                except OSError as error:  # for example, the server doesn't read it all
                    greedy.count("bodies", type(error).__name__)
                    greedy.ends.wait(1)
                    continue
                greedy.count("bodies", "sent")
                held[connection.fileno()] = connection
                poll.register(connection, select.POLLIN)
            for descriptor, _ in poll.poll(0 if len(held) < _NUM_SOCKETS else 500):
                connection = held.pop(descriptor)
                poll.unregister(connection)
                answer = b""
                with suppress(OSError):
                    answer = connection.recv(64)
                greedy.count("bodies", answer[9:12].decode("ascii", "replace") or "closed")
                connection.close()
                greedy.ends.wait(0.5)
    finally:
        for connection in held.values():
            connection.close()


def train_for_days(greedy: Greedy, rng: random.Random) -> None:
    """Submit a job of a million steps, and count its steps as long as it isn't ended."""
    body = {"name": "forever", "data": code_rows(24), "training": {"max_steps": 1_000_000}, "lora": {"rank": 4}}
    response = greedy.post("job", "/train", json=body)
    if response.status_code != 202:
        return
    steps = 0
    while not greedy.ends.wait(2):
        job = greedy.client.get(f"/train/{response.json()['id']}")
        if job.status_code != 200:
            greedy.count("job", str(job.status_code))
            continue
        if job.json()["status"] in ("failed", "cancelled", "succeeded"):
            greedy.count("job", job.json()["status"])
            return
        new = job.json()["progress"]["step"]
        greedy.count("job", "steps", new - steps)
        steps = new


ACTIVITIES: Mapping[str, Activity] = {
    activity.name: activity
    for activity in (
        # First, as later the project's own dry runs may crowd it out.
        Activity("job", train_for_days, 1, 5.0, frozenset({"steps"}), 1),
        Activity("rows", hold_rows, 2, 0.2, frozenset({"pieces"}), 10),
        Activity("streams", fill_batch, 16, 1.0, frozenset({"pieces"}), 200),
        Activity("prompts", send_long_prompt, 2, 0.5, frozenset({"200", WAITING}), 1),
        Activity("refused", send_too_long_prompt, 45, 10.0, frozenset({"422", "413", "429"}), 20),
        Activity("regex", follow_regex, 24, 1.0, frozenset({"pieces"}), 50),
        Activity("grammars", send_grammar, 12, 1.0, frozenset({"200", "422"}), 5),
        Activity("dryruns", run_dry, 6, 2.0, frozenset({"200", WAITING}), 1),
        Activity("merges", ask_for_merge, 60, 2.0, frozenset({"422", "409", "429"}), 20),
        Activity("uploads", upload, 2, 2.0, frozenset({"201", "429", WAITING}), 1),
        Activity("bodies", hold_bodies, 4, 1.0, frozenset({"sent"}), 100),
        Activity("containers", send_containers, 2, 0.5, frozenset({"422", "413", "400"}), 5),
    )
}


class Running:
    """Greedy's process, once all of its clients have begun. `counts` are outcomes by activity, set at the end."""

    def __init__(self) -> None:
        self.counts: Mapping[str, Mapping[str, int]] = {}


@contextmanager
def running(target: Target, clients: Mapping[str, int]) -> Iterator[Running]:
    """Run `clients` of each activity in another process while the block runs."""
    context = multiprocessing.get_context("spawn")
    has_begun, ends = context.Event(), context.Event()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(target, dict(clients), has_begun, ends, sender), daemon=True)
    process.start()
    found = Running()
    try:
        assert has_begun.wait(60), "greedy's process didn't begin"
        yield found
    finally:
        ends.set()
        if receiver.poll(30):
            found.counts = receiver.recv()
        process.join(10)
        process.kill()


def _run(target: Target, clients: Mapping[str, int], has_begun: Any, ends: Any, sender: Any) -> None:
    _step_back()
    greedy = Greedy(target)
    for name, number in clients.items():
        for seed in range(number):
            threading.Thread(target=greedy.run, args=(ACTIVITIES[name], seed), daemon=True).start()
    has_begun.set()
    parent = multiprocessing.parent_process()
    while not ends.wait(1) and parent is not None and parent.is_alive():
        pass
    greedy.ends.set()
    with greedy.lock:
        sender.send({name: dict(+outcomes) for name, outcomes in greedy.counts.items()})
    sender.close()
    os._exit(0)  # whatever the clients still wait for: their connections end with the process


def _step_back() -> None:
    """Give this process the lowest priority.

    Linux may schedule sessions as groups, within which alone niceness counts: so it gets a session of its own,
    and the session the same niceness.
    """
    os.setsid()
    os.nice(NICENESS)
    with suppress(OSError):  # a system without such groups
        Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")


def _half_sent(target: Target) -> socket.socket:
    """Return a connection on which a request waits for its last bytes."""
    url = urlsplit(target.url)
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {target.secret}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {2 * MIB}\r\n\r\n"
    )
    connection = socket.create_connection((str(url.hostname), int(url.port or 80)), _SOCKET_TIMEOUT)
    try:
        connection.sendall(head.encode() + b'{"prompt":"' + b"a" * (2 * MIB - 100))
    except BaseException:
        connection.close()
        raise
    return connection


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))
