"""kill -9 of workers and servers at random moments; every job ends as one that nobody disturbed.

    python -m tests.stress.kill_nine --worker 20 --server 5 --base tiny

A real server trains on the base. Each kill strikes a running attempt, at a moment drawn from the time that an
undisturbed job takes; a job that ends before is followed by another one. Nobody helps: a killed worker is started
again by its server, a killed server by whoever keeps machines running, here this program. In the end each job has
succeeded, has exactly one version, and that version's bytes, its events and its numbers are those of the
undisturbed job.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil

from tests.end_to_end.training_client import CHILD, WORKER, get, processes, wait_until
from tests.stress.equal_jobs import Base, Drill

Victim = Literal["worker", "server"]


def kill(drill: Drill, victim: Victim, alone: bool, after_attempt: int = 0) -> float:
    """Kill it in the middle of a later attempt at the last job; how many seconds after the attempt's start."""
    while True:
        after_attempt = drill.running(after_attempt)
        moment = drill.rng.uniform(0, drill.seconds)
        time.sleep(moment)
        if get(drill.server, f"/train/{drill.jobs[-1]}")["status"] == "running":
            break
    if victim == "worker":
        _kill_worker(drill, alone)
    else:
        _kill_server(drill, alone)
    return moment


def _kill_worker(drill: Drill, alone: bool) -> None:
    doomed = processes(drill.server, WORKER) + processes(drill.server, CHILD)
    for process in processes(drill.server, WORKER) if alone else doomed:
        process.send_signal(signal.SIGKILL)
    _wait_for_death(doomed)


def _kill_server(drill: Drill, alone: bool) -> None:
    doomed = psutil.Process(drill.server.process.pid).children(recursive=True)
    if alone:
        drill.server.process.send_signal(signal.SIGKILL)
        drill.server.process.wait()
    else:
        drill.server.kill()
    _wait_for_death(doomed)
    drill.restart()


def _wait_for_death(doomed: Sequence[psutil.Process]) -> None:
    """Whoever was killed, or depends on who was, dies at once; somebody reaps it soon."""
    wait_until(lambda: not any(map(_is_alive, doomed)), 10, "dying")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_at_random(base: Base, home: Path, victims: Sequence[Victim], seed: int = 0) -> str:
    """Kill one after the other, every second one alone; what was seen, in a line. AssertionError as `check`."""
    drill = Drill.begin(base, home, seed)
    started = time.monotonic()
    try:
        for number, victim in enumerate(victims):
            moment = kill(drill, victim, alone=number % 2 == 0)
            sys.stdout.write(f"kill {number + 1}: {victim}, {moment:.1f} s into an attempt at {drill.jobs[-1]}\n")
            sys.stdout.flush()
        drill.check()
    finally:
        drill.server.close()
    return (
        f"{base} base: {victims.count('worker')} workers and {victims.count('server')} servers killed during "
        f"{len(drill.jobs) - 1} jobs of {drill.seconds:.1f} s, in {time.monotonic() - started:.0f} s: "
        f"all succeeded, one version each, all of digest {drill.digest[:16]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=int, default=20, help="how many workers to kill")
    parser.add_argument("--server", type=int, default=5, help="how many servers to kill")
    parser.add_argument("--base", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    killed: list[tuple[Victim, int]] = [("worker", arguments.worker), ("server", arguments.server)]
    victims = [victim for victim, count in killed for _ in range(count)]
    random.Random(arguments.seed).shuffle(victims)
    with tempfile.TemporaryDirectory() as directory:
        said = kill_at_random(arguments.base, Path(directory), victims, arguments.seed)
    sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()
