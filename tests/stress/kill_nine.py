"""kill -9 of workers and servers at random moments; every job ends like an undisturbed one.

    python -m tests.stress.kill_nine --worker 20 --server 5 --base tiny

A real server trains on the base. Each kill strikes a running attempt at a random moment within the duration of an
undisturbed job; if a job ends earlier, another one is submitted. The server restarts a killed worker; this program
restarts a killed server, as a service manager would. At the end each job has succeeded and has exactly one
version, whose bytes, events and numbers equal the undisturbed job's.
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
from tests.stress.equal_jobs import Base, TrainingServer

Victim = Literal["worker", "server"]


def kill(training: TrainingServer, victim: Victim, alone: bool, after_attempt: int = 0) -> float:
    """Kill in the middle of a later attempt of the last job; return the seconds since the attempt's start."""
    while True:
        after_attempt = training.running(after_attempt)
        moment = training.rng.uniform(0, training.seconds)
        time.sleep(moment)
        if get(training.server, f"/train/{training.jobs[-1]}")["status"] == "running":
            break
    if victim == "worker":
        _kill_worker(training, alone)
    else:
        _kill_server(training, alone)
    return moment


def _kill_worker(training: TrainingServer, alone: bool) -> None:
    doomed = processes(training.server, WORKER) + processes(training.server, CHILD)
    for process in processes(training.server, WORKER) if alone else doomed:
        process.send_signal(signal.SIGKILL)
    _wait_for_death(doomed)


def _kill_server(training: TrainingServer, alone: bool) -> None:
    doomed = psutil.Process(training.server.process.pid).children(recursive=True)
    if alone:
        training.server.process.send_signal(signal.SIGKILL)
        training.server.process.wait()
    else:
        training.server.kill()
    _wait_for_death(doomed)
    training.restart()


def _wait_for_death(doomed: Sequence[psutil.Process]) -> None:
    """Wait for the death of the killed process and of all that depend on it, and for their reaping."""
    wait_until(lambda: not any(map(_is_alive, doomed)), 10, "dying")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_at_random(base: Base, home: Path, victims: Sequence[Victim], seed: int = 0) -> str:
    """Kill repeatedly, every second victim alone; return a line on what was seen. Raise AssertionError like
    `check`."""
    training = TrainingServer.begin(base, home, seed)
    started = time.monotonic()
    try:
        for number, victim in enumerate(victims):
            moment = kill(training, victim, alone=number % 2 == 0)
            sys.stdout.write(
                f"kill {number + 1}: {victim}, {moment:.1f} s into an attempt at {training.jobs[-1]}\n"
            )
            sys.stdout.flush()
        training.check()
    finally:
        training.server.close()
    return (
        f"{base} base: {victims.count('worker')} workers and {victims.count('server')} servers killed during "
        f"{len(training.jobs) - 1} jobs of {training.seconds:.1f} s, in {time.monotonic() - started:.0f} s: "
        f"all succeeded, one version each, all of digest {training.digest[:16]}"
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
