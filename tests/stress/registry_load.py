"""Steady load while the registry changes: `python -m tests.stress.registry_load --minutes 2`.

Clients generate under names, versions, aliases, compositions and sums, plain and streamed, while
`registry_changes` changes all of these. Every answer must equal a cold server's answer for the versions that it
names, computed one at a time. These versions must have been possible meanings at that time, and errors must be
documented ones. At the end nothing without a name may be stored. Needs a few minutes on two cores.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import safetensors.torch as safetensors

from adapters.expression import parse
from adapters.lora import BaseShape
from server.model.base.source import EMBEDDED, resolve_base
from server.model.base.weights import load_base
from server.operations.doctor import examine
from tests.end_to_end.server_process import ServerProcess, events
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.stress.registry_changes import ALIAS, Changer, Files, Leaves, Timeline, digests_of

NUM_SEEDS = 8
PROMPTS = [
    "The harbour master wrote down the name of every ship that came in, where it came from and what it brought: ",
    "404 Not Found. Nothing matches the given URI. 503 Service Unavailable. The server cannot process the one ",
    "Once upon a time, in a village by the sea, there lived a carpenter who built boats that no one wanted. So ",
]
"""Prompts longer than a block of the KV cache, so that prefixes are shared; no two share their first block."""


def adapter_files(shape: BaseShape) -> list[Files]:
    """Return PEFT files of adapters that are strong enough to change answers, which stay text.

    With stronger adapters the last bits of the model's sums, and so the other sequences in the batch, decide
    answers.
    """
    return [_scaled(*peft_files(seed, rank=2 + seed % 3, shape=shape)) for seed in range(NUM_SEEDS)]


def _scaled(config: bytes, weights: bytes) -> Files:
    """Scale B A x to about the size of x."""
    tensors = {name: tensor / tensor.shape[1] ** 0.5 / 2 for name, tensor in safetensors.load(weights).items()}
    return config, safetensors.save(tensors)


class Server(Protocol):
    url: str


@dataclass(frozen=True)
class Answer:
    """One request: what was asked, when, and the response."""

    expression: str
    prompt: str
    began: float
    ended: float
    status: int
    leaves: Leaves = ()
    digests: tuple[str, ...] = ()
    text: str = ""
    num_cached: int = 0


@dataclass
class Outcome:
    """The outcome of a run; `faults` is empty if everything was right."""

    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    num_sums: int = 0  # different (adapters, prompt) that were compared with a cold run


@dataclass(frozen=True)
class Plan:
    """The amount of load. Each of `names` is changed about every `pause` seconds.

    The load continues for up to ten times `seconds` until there are enough good answers, and one of each of
    `kinds`.
    """

    seconds: float
    num_clients: int = 16
    num_names: int = 4
    max_tokens: int = 12
    pause: float = 0.4
    num_answers: int = 0
    kinds: Sequence[str] = ()

    def is_done(self, answers: Sequence[Answer], changers: Sequence[Changer]) -> bool:
        """Return whether there was enough of everything."""
        counts = sum((changer.counts.copy() for changer in changers), Counter[str]())
        counts += Counter(f"generate: {answer.status}" for answer in list(answers))
        return counts["generate: 200"] >= self.num_answers and all(counts[kind] for kind in self.kinds)


def load(server: Server, plan: Plan, files: Sequence[Files]) -> tuple[list[Answer], list[Changer], list[str]]:
    """Run clients and changers concurrently; return the answers and the clients' faults."""
    changers = [Changer(server.url, n, plan.num_names, files, plan.pause) for n in range(plan.num_names)]
    answers: list[Answer] = []
    faults: list[str] = []
    stop = threading.Event()

    def client(number: int) -> None:
        chance = random.Random(1000 + number)
        try:
            with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as connection:
                while not stop.is_set():
                    asked = _expression(chance, changers), chance.choice(PROMPTS)
                    answers.append(_ask(connection, *asked, plan.max_tokens, stream=chance.random() < 0.3))
        except Exception as error:
            faults.append(f"client {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=changer.run, args=(stop,)) for changer in changers]
    threads += [threading.Thread(target=client, args=(number,)) for number in range(plan.num_clients)]
    for thread in threads:
        thread.start()
    time.sleep(plan.seconds)
    end = time.monotonic() + 9 * plan.seconds
    while not plan.is_done(answers, changers) and time.monotonic() < end:
        time.sleep(0.2)
    stop.set()
    for thread in threads:
        thread.join()
    return answers, changers, faults


def judge(
    plan: Plan, answers: Sequence[Answer], changers: Sequence[Changer], cold: Server, files: Sequence[Files]
) -> Outcome:
    """Compare every answer with the possible meanings of its names, and with a cold run of the adapters that it
    names."""
    outcome = Outcome()
    for changer in changers:
        outcome.faults += changer.faults
        outcome.counts += changer.counts
    timelines = {key: timeline for changer in changers for key, timeline in changer.timelines.items()}
    digests = digests_of(changers)
    seeds = {digest: seed for changer in changers for digest, seed in changer.seeds.items()}
    with httpx.Client(base_url=cold.url, timeout=120, trust_env=False) as client:
        expected = _Cold(client, plan.max_tokens, files, seeds)
        for answer in answers:
            outcome.counts[f"generate: {answer.status}"] += 1
            outcome.counts["generate: cached tokens"] += answer.num_cached
            fault = _fault_of_meaning(answer, timelines, digests)
            if fault is None and answer.status == 200 and answer.text != (said := expected.text(answer)):
                fault = f"said {answer.text!r}, and cold {said!r}"
            if fault is not None:
                outcome.faults.append(f"{answer.expression} {answer.leaves}: {fault}")
        outcome.num_sums = expected.num_sums
    return outcome


def main() -> int:
    """Return the exit code: 0 if everything was right."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.stress.registry_load")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--base", default=EMBEDDED, help="default: the real one")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where a converted base is kept")
    options = parser.parse_args()
    plan = Plan(60 * options.minutes, options.clients)
    base = resolve_base(options.base, options.cache)
    shape = load_base(base).config.shape
    files = adapter_files(shape)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "load"
        server = ServerProcess(home, model=base, dtype="fp32", max_num_seqs=plan.num_clients)
        try:
            answers, changers, faults = load(server, plan, files)
            server.wait_until_idle()
            server.terminate()  # a killed server may leave bytes that a thread is about to remove
            server.exit_code()
        finally:
            server.close()
        cold = ServerProcess(Path(scratch) / "cold", model=base, dtype="fp32")
        try:
            outcome = judge(plan, answers, changers, cold, files)
        finally:
            cold.close()
        outcome.faults += faults + unsound(home)
    counts = dict(sorted(outcome.counts.items()))
    report = {
        "seconds": plan.seconds,
        "clients": plan.num_clients,
        "compared_sums": outcome.num_sums,
        **counts,
        "faults": len(outcome.faults),
        "first_faults": outcome.faults[:10],
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return 1 if outcome.faults else 0


def unsound(home: Path) -> list[str]:
    """Return the faults of the stored data once nothing runs."""
    return [f"{finding.about}: {finding.message}" for finding in examine(home).findings]


class _Cold:
    """The answers of a freshly started server, asked once for each sum of adapters and prompt, one at a time."""

    def __init__(
        self, client: httpx.Client, max_tokens: int, files: Sequence[Files], seeds: Mapping[str, int]
    ) -> None:
        self._client = client
        self._max_tokens = max_tokens
        self._names = {digest: f"cold{seed}" for digest, seed in seeds.items()}
        self._said: dict[tuple[object, ...], str] = {}
        for seed in sorted(set(seeds.values())):
            response = self._client.post(f"/adapters/cold{seed}", files=as_parts(*files[seed]))
            assert response.status_code == 201, response.text
            assert self._names[response.json()["digest"]] == f"cold{seed}"

    @property
    def num_sums(self) -> int:
        return len(self._said)

    def text(self, answer: Answer) -> str:
        sums: dict[str, float] = {}
        for (_, _, weight), digest in zip(answer.leaves, answer.digests, strict=True):
            sums[digest] = sums.get(digest, 0.0) + weight  # halves and quarters: exact
        kept = tuple(sorted((digest, weight) for digest, weight in sums.items() if weight))
        key = (kept, answer.prompt)
        if key not in self._said:
            expression = "+".join(f"{self._names[digest]}*{weight}" for digest, weight in kept) or "base"
            asked = _ask(self._client, expression, answer.prompt, self._max_tokens, stream=False)
            assert (asked.status, asked.num_cached) == (200, 0)
            self._said[key] = asked.text
        return self._said[key]


def _expression(chance: random.Random, changers: Sequence[Changer]) -> str:
    one, other = chance.choice(changers), chance.choice(changers)
    newest = max((version for _, version in list(one.digests)), default=1)
    choices = [one.name, one.name, f"{one.name}@{ALIAS}", one.mix, f"{one.name}*0.5+{other.name}*-0.5"]
    choices += [f"{one.name}@{chance.randint(max(1, newest - 4), newest)}", f"{one.mix}*0.5+{other.name}", "base"]
    return chance.choice(choices)


def _ask(client: httpx.Client, expression: str, prompt: str, max_tokens: int, stream: bool) -> Answer:
    body = {"prompt": prompt, "adapter": expression, "max_tokens": max_tokens}
    body |= {"temperature": 0, "ignore_eos": True, "stream": stream}
    began = time.monotonic()
    with client.stream("POST", "/generate", json=body) as response:
        if response.status_code != 200:
            response.read()
            return Answer(expression, prompt, began, time.monotonic(), response.status_code)
        if stream:
            pieces: list[dict[str, Any]] = list(events(response.iter_lines()))
            last, text = pieces[-1], "".join(piece.get("text", "") for piece in pieces)
        else:
            last = json.loads(response.read())
            text = last["choices"][0]["text"]
    ended = time.monotonic()
    parts = last["adapters"]
    leaves = tuple((part["name"], part["version"], part["weight"]) for part in parts)
    digests = tuple(part["digest"] for part in parts)
    return Answer(expression, prompt, began, ended, 200, leaves, digests, text, last["usage"]["cached_tokens"])


def _fault_of_meaning(
    answer: Answer, timelines: Mapping[str, Timeline], digests: Mapping[tuple[str, int], str]
) -> str | None:
    """Return a fault if the answer's parts weren't a possible meaning of its expression during the request."""
    if answer.status not in (200, 404):
        return f"status {answer.status}"
    meanings = _meanings(answer, timelines, digests)
    if answer.status == 404:
        return None if None in meanings else "404 of what was there all the time"
    if answer.leaves not in meanings:
        return f"never meant that, but {meanings}"
    named = tuple(digests.get((name, version)) for name, version, _ in answer.leaves)
    return None if named == answer.digests else "has other bytes than were published under its version"


def _meanings(
    answer: Answer, timelines: Mapping[str, Timeline], digests: Mapping[tuple[str, int], str]
) -> list[Leaves | None]:
    """Return every combination of the terms' possible meanings; None: a term didn't exist."""
    found: list[Leaves | None] = [()]
    for term in [] if answer.expression == "base" else parse(answer.expression):
        if term.version is not None:  # it may have been deleted at any time, or not exist yet
            there = (term.name, term.version) in digests
            options: list[Leaves | None] = [None, ((term.name, term.version, 1.0),)] if there else [None]
        else:
            options = timelines[term.reference].possible(answer.began, answer.ended)
        found = [
            None if before is None or option is None else before + _times(option, term.weight)
            for before in found
            for option in options
        ]
    return found


def _times(leaves: Leaves, weight: float) -> Leaves:
    return tuple((name, version, by * weight) for name, version, by in leaves)


if __name__ == "__main__":
    sys.exit(main())
