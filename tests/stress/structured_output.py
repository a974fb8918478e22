"""`python -m tests.stress.structured_output`: structured answers of a real server, and hostile grammars.

Runs rotate through ten bounded JSON schemas, some greedy, most sampled, eight at a time. Every answer that ends
with `stop` must parse and validate. Then eight free streams run, first undisturbed and then alongside hostile
grammars: each grammar must be refused in less than two seconds, and the streams must keep their pace.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema

from server.model.base.source import EMBEDDED, resolve_base
from tests.end_to_end.server_process import ServerProcess
from tests.kits.cache import CACHE
from tests.kits.grammars import BOUNDED, HOSTILE_REGEX, HOSTILE_SCHEMA, Schema

MAX_TOKENS = 160
NUM_STREAMS = 8
REFUSED_WITHIN = 2.0
"""Seconds."""
SLOWER = 1.5
"""Allowed ratio of the median pause between two tokens with and without hostile grammars."""

HOSTILE: Sequence[Mapping[str, object]] = (
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": HOSTILE_SCHEMA}}},
    {"regex": HOSTILE_REGEX},
    {"regex": "(" * 4000 + "a" + ")" * 4000},
)


@dataclass(frozen=True)
class Answers:
    """Outcomes of the runs. `faults` are answers that ended with `stop` and don't validate."""

    ends: Mapping[str, int]
    faults: Sequence[str]

    def __str__(self) -> str:
        return "\n".join([", ".join(f"{count} {end}" for end, count in self.ends.items()), *self.faults])


@dataclass(frozen=True)
class Pace:
    """Pauses between the streams' tokens, in seconds, and the refusals of hostile grammars."""

    median_alone: float
    median_beside: float
    longest_beside: float
    refused_after: Sequence[float]
    statuses: Mapping[int, int]

    def __str__(self) -> str:
        return (
            f"pauses between tokens: median {self.median_alone * 1e3:.1f} ms alone, "
            f"{self.median_beside * 1e3:.1f} ms beside hostile grammars, at most {self.longest_beside:.2f} s; "
            f"{len(self.refused_after)} of them, within {max(self.refused_after):.2f} s: {dict(self.statuses)}"
        )

    @property
    def holds(self) -> bool:
        return (
            set(self.statuses) == {422}
            and max(self.refused_after) < REFUSED_WITHIN
            and self.median_beside < SLOWER * self.median_alone
        )


def ask(server: ServerProcess, num_runs: int) -> Answers:
    """Run the schemas in rotation; a run's seed is its number."""

    def one(number: int) -> tuple[str, str | None]:
        name = list(BOUNDED)[number % len(BOUNDED)]
        return fault_of(server, name, BOUNDED[name], number)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(num_runs)))
    return Answers(Counter(end for end, _ in found), [fault for _, fault in found if fault])


def fault_of(server: ServerProcess, name: str, schema: Schema, seed: int) -> tuple[str, str | None]:
    """Return how an answer ended, and its fault."""
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    answer = server.generate(
        f"An example of a {name} as JSON: ",
        response_format=form,
        seed=seed,
        temperature=0.0 if seed % 4 == 0 else 1.0,
        max_tokens=MAX_TOKENS,
    )
    (choice,) = answer["choices"]
    if choice["finish_reason"] != "stop":
        return choice["finish_reason"], None
    try:
        jsonschema.validate(json.loads(choice["text"]), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return "stop", f"{name}, seed {seed}: {choice['text']!r}: {error}"
    return "stop", None


def pace(server: ServerProcess, seconds: float, num_streams: int = NUM_STREAMS) -> Pace:
    """Run the streams for `seconds` alone, and for `seconds` alongside one hostile grammar after the other."""
    times: list[list[float]] = [[] for _ in range(num_streams)]
    is_over = threading.Event()

    def listen(number: int) -> None:
        while not is_over.is_set():
            fields: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "seed": number, "temperature": 1.0}
            with server.stream(f"Story {number}:", **fields) as events:
                for event in events:
                    if "text" in event:
                        times[number].append(time.monotonic())
                    if is_over.is_set():
                        break

    with ThreadPoolExecutor(num_streams) as pool:
        listeners = [pool.submit(listen, number) for number in range(num_streams)]
        try:
            while not all(times):
                time.sleep(0.01)
            begun = time.monotonic()
            time.sleep(seconds)
            middle = time.monotonic()
            statuses: Counter[int] = Counter()
            refused_after = []
            while time.monotonic() < middle + seconds:
                for fields in HOSTILE:
                    asked = time.monotonic()
                    response = server.client.post("/generate", json={"prompt": "a", **fields})
                    refused_after.append(time.monotonic() - asked)
                    statuses[response.status_code] += 1
            end = time.monotonic()
        finally:
            is_over.set()
        for listener in listeners:
            listener.result()
    alone, beside = pauses(times, begun, middle), pauses(times, middle, end)
    return Pace(statistics.median(alone), statistics.median(beside), max(beside), refused_after, statuses)


def pauses(times: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """Return the pauses between two tokens of one stream within the interval."""
    found: list[float] = []
    for stream in times:
        inside = [at for at in stream if begin <= at <= end]
        found += [after - before for before, after in pairwise(inside)]
    return found


def main() -> int:
    """Run both parts on the real base. Return exit code 1 if either fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.structured_output", description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each half of the second part")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        server = ServerProcess(Path(home), model=resolve_base(EMBEDDED, CACHE))
        try:
            begun = time.monotonic()
            answers = ask(server, options.runs)
            say(f"{options.runs} runs over {len(BOUNDED)} schemas in {time.monotonic() - begun:.0f} s: {answers}")
            found = pace(server, options.seconds)
        finally:
            server.close()
    say(str(found))
    return 0 if found.holds and not answers.faults and answers.ends.get("stop") else 1


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
