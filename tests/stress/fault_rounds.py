"""Rounds of SIGKILL, SIGSTOP and SIGTERM for server and workers under full load.

    python -m tests.stress.fault_rounds --rounds 200

A real server on a tiny base answers, trains and publishes for two projects. Each round strikes the server, a
worker or a job's process at a random moment, and restarts the server if it ended. At the end every accepted job
has ended exactly once. Every listed version loads and was published exactly once. The ledger has every answer that
ended more than a second before a strike, and none twice. `smolora doctor` finds nothing.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from server.access.keys import Keys
from server.access.principal import OPERATOR, SCOPES
from server.database import connect
from server.storage.home import Home
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import CHILD, WORKER, processes
from tests.kits.tiny import NATIVE_SIZES, save_tiny_base
from tests.stress.fault_load import (
    COUNTED_AFTER,
    PROJECTS,
    Load,
    call,
    check,
    check_ledger,
    diagnosed,
    publish,
    random_files,
    train,
    under_load,
)

Victim = Literal["server", "worker", "job"]
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "end": signal.SIGTERM}


@dataclass
class Rounds:
    """A server and the strikes on it."""

    home: Path
    model: Path
    operator: str
    server: ServerProcess
    load: Load

    @classmethod
    def begin(cls, home: Path, seed: int) -> "Rounds":
        model = save_tiny_base(home.with_name("tiny"), "llama", NATIVE_SIZES)
        database = connect(home)
        keys = Keys(database, Home(home).keyed)
        _, operator = keys.create("operator", who=OPERATOR, scopes=SCOPES)
        secrets = {project: keys.create("test", who=OPERATOR, project=project)[1] for project in PROJECTS}
        database.dispose()
        server = start(home, model, operator)
        load = Load(random.Random(seed), secrets, random_files(model, home), lambda: rounds.server.url)
        rounds = cls(home, model, operator, server, load)
        return rounds


def start(home: Path, model: Path, key: str) -> ServerProcess:
    return ServerProcess(home, key=key, model=model, workers=1, max_model_len=256, kv_cache_bytes=1 << 26)


def strike(rounds: Rounds) -> str:
    """Strike a random process with a random signal; return once the server is reachable again."""
    rng = rounds.load.rng
    how = rng.choice(list(SIGNALS))
    victim: Victim = rng.choice(["server", "server", "worker", "job"])
    module = {"worker": WORKER, "job": CHILD}.get(victim)
    struck = [psutil.Process(rounds.server.process.pid)] if module is None else processes(rounds.server, module)
    rounds.load.strikes.append(time.monotonic())
    for process in struck[:1]:
        process.send_signal(SIGNALS[how])
        if how == "stop":
            time.sleep(rng.uniform(0.2, 3))
            process.send_signal(signal.SIGCONT)
    if victim == "server" and how != "stop":
        rounds.server.exit_code()
        rounds.server.close()
        rounds.server = start(rounds.home, rounds.model, rounds.operator)
    return f"{how} {victim}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds. Return 1 if a condition fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rounds-") as scratch:
        rounds = Rounds.begin(Path(scratch) / "home", options.seed)
        load = rounds.load
        try:
            with under_load(load, [call, call, publish, train]):
                for _ in range(options.rounds):
                    time.sleep(load.rng.uniform(0.1, 2))
                    load.done[strike(rounds)] += 1
            time.sleep(COUNTED_AFTER)
            rows = {project: load.get(project, "/usage")["rows"][0] for project in PROJECTS}
            found = load.wrong + check_ledger(load, rows) + check(load) + diagnosed(rounds.home)
        finally:
            rounds.server.close()
    sys.stdout.write(json.dumps(dict(load.done)) + "\n")
    sys.stdout.write(("\n".join(found[:40]) or "everything is as it must be") + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
