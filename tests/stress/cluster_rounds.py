"""Rounds of faults in a whole cluster under full load.

    python -m tests.stress.cluster_rounds --rounds 100

Two API processes, two engine replicas on Ray Serve, two workers on different hosts, PostgreSQL and an object store
answer, train and publish for two projects. Each round strikes one of these processes at a random moment, or
`--only` in one way. At the end the conditions of `fault_load` hold, and these: every complete greedy answer equals
the single process's answer. Every answer that was cut off is a prefix of it and ended with `event: error`, unless
the API process itself was killed. No client got a 500, or waited for more than a minute. `/ready` answered within
seconds. Every process is running again.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.strikes import LONG, STRIKES, Rounds, strike
from tests.cluster.whole import Whole
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import wait_until
from tests.kits.tiny import NATIVE_SIZES, save_tiny_base
from tests.stress.audit import Answered
from tests.stress.fault_load import (
    COUNTED_AFTER,
    PROJECTS,
    Load,
    Work,
    check,
    check_ledger,
    publish,
    random_files,
    train,
    under_load,
)

FLAGS: dict[str, Any] = {
    "device": "cpu",
    "max_num_seqs": 16,
    "max_model_len": 2048,
    "kv_cache_bytes": "64MiB",
    "adapter_cache_bytes": "8MiB",
}
SIZES = {**NATIVE_SIZES, "max_position_embeddings": 2048}
ADAPTERS = (None, "fixed", "fixed*0.5", "fixed*2+other*-0.5")
NUM_LONG, NUM_SHORT = 1500, 20  # tokens
READY_SECONDS = 20.0  # for /ready, on a machine that is busy
LONG_ROUNDS = 20  # with at least this number of rounds, some strikes take a minute
Body = dict[str, Any]


def bodies() -> list[Body]:
    """Return greedy requests, with and without adapters."""
    return [
        {
            "prompt": f"{number} HTTP " * (number % 5 + 1),
            "max_tokens": length - number,
            "ignore_eos": True,
            "temperature": 0,
            **({} if adapter is None else {"adapter": adapter}),
        }
        for length in (NUM_LONG, NUM_SHORT)
        for number, adapter in enumerate(ADAPTERS * 3)
    ]


def begin(scratch: Path, seed: int) -> Rounds:
    """Collect reference answers from a single process, then start the cluster."""
    model = save_tiny_base(scratch / "tiny", "llama", SIZES)
    single = ServerProcess(scratch / "single", model=model, **FLAGS)
    files = random_files(model, single.home)
    try:
        for name, parts in zip(("fixed", "other"), files, strict=False):
            assert single.client.post(f"/adapters/{name}", files=parts).status_code == 201
        expected = {json.dumps(body): single.text(**body) for body in bodies()}
    finally:
        single.close()
    whole = Whole(scratch / "cluster", model, **FLAGS)
    rng, choice = random.Random(seed), random.Random(seed)
    secrets = {project: whole.key("test", project=project) for project in PROJECTS}
    load = Load(rng, secrets, files, lambda: choice.choice(whole.urls))
    for project in PROJECTS:
        for name, parts in zip(("fixed", "other"), files, strict=False):
            response = load.post(project, f"/adapters/{name}", files=parts)
            assert response is not None
            assert response.status_code == 201, response.text
    load.log.expected = expected
    return Rounds(whole, load)


def works(rounds: Rounds) -> list[Work]:
    """Return the activities that run all the time."""

    def generate(load: Load, rng: random.Random) -> None:
        project, body = rng.choice(PROJECTS), rng.choice(bodies())
        response = load.post(project, "/generate", json=body)
        if response is not None and response.status_code == 200:
            answer = response.json()
            load.answered(project, answer["usage"])
            load.log.answers.append(Answered(json.dumps(body), answer["choices"][0]["text"]))
            return
        load.lost[project] += body["max_tokens"]
        if response is not None:
            refused(load, response)

    def stream(load: Load, rng: random.Random) -> None:
        project, body, url = rng.choice(PROJECTS), rng.choice(bodies()), load.url()
        begun, text, usage, error = time.monotonic(), "", None, None
        rounds.reading[me := threading.get_ident()] = False
        headers = {"Authorization": f"Bearer {load.secrets[project]}"}
        sent = {**body, "stream": True}
        with (
            suppress(httpx.HTTPError),
            httpx.stream(
                "POST", f"{url}/generate", json=sent, headers=headers, timeout=60, trust_env=False
            ) as response,
        ):
            if response.status_code != 200:
                response.read()
                refused(load, response)
                error = "refused"
            lines = response.iter_lines() if error is None else iter(())
            for line in lines:
                if line.startswith("event: error"):
                    error = next(lines)
                elif line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    text += event.get("text", "")
                    rounds.reading[me] = True
                    usage = event.get("usage")
                elif line == "data: [DONE]":
                    break
        del rounds.reading[me]
        load.log.answers.append(Answered(json.dumps(body), text, is_complete=usage is not None))
        if usage is not None:
            load.answered(project, usage)
            load.done["streams"] += 1
            return
        load.lost[project] += body["max_tokens"]
        if error is None:
            ended = time.monotonic()
            if not any(url == down.url and down.begin <= ended and begun <= down.end for down in rounds.down):
                load.wrong.append(
                    f"a stream broke off after {ended - begun:.1f} s of {url}: {len(text)} characters"
                )
            load.done["streams that broke off, or found no API process"] += 1
        elif error != "refused":
            load.done[f"streams cut {'after' if text else 'before'} the first token"] += 1

    def look(load: Load, rng: random.Random) -> None:
        """Ask whether an API process is ready, as a load balancer does."""
        begun, url = time.monotonic(), load.url()
        with suppress(httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
            try:
                code = httpx.get(f"{url}/ready", timeout=READY_SECONDS, trust_env=False).status_code
                load.done[f"/ready was {code}"] += 1
            except httpx.TimeoutException:
                took = time.monotonic() - begun
                load.wrong.append(f"/ready of {url} didn't answer within {took:.1f} s")
        load.ends.wait(0.5)

    return [generate, *[stream] * 5, publish, train, look]


def refused(load: Load, response: httpx.Response) -> None:
    """Count a temporary refusal; record any other error as wrong."""
    load.done[f"answered {response.status_code}"] += 1
    if response.status_code not in (429, 503):
        load.wrong.append(f"answered {response.status_code}: {response.text[:300]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds. Return 1 if a condition fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*STRIKES, *LONG], help="strike only so")
    parser.add_argument("--log", type=Path, help="where to keep what the processes said")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="cluster-rounds-") as scratch:
        rounds = begin(Path(scratch), options.seed)
        load, whole, started = rounds.load, rounds.whole, time.monotonic()
        try:
            with under_load(load, works(rounds)):
                for number in range(options.rounds):
                    time.sleep(load.rng.uniform(0.1, 2))
                    load.done[
                        name := strike(rounds, only=options.only, is_long=options.rounds >= LONG_ROUNDS)
                    ] += 1
                    sys.stderr.write(f"{time.monotonic() - started:6.1f} s, round {number}: {name}\n")
            took = time.monotonic() - started
            sys.stderr.write(f"{took:6.1f} s, all rounds done: waiting for what is under way\n")
            wait_until(lambda: whole.is_ready() and len(whole.parts("replica")) == 2, 300, "all of it")
            time.sleep(3 * COUNTED_AFTER)
            rows = {project: load.get(project, "/usage")["rows"][0] for project in PROJECTS}
            found = load.wrong + check_ledger(load, rows) + check(load)
        finally:
            whole.close()
            if options.log is not None:
                options.log.write_text(whole.log())
    sys.stdout.write(json.dumps({"seed": options.seed, "seconds": round(took), **load.done}) + "\n")
    sys.stdout.write(("\n".join(found[:40]) or "everything is as it must be") + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
