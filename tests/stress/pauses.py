"""Pauses at random moments; every job ends like an undisturbed one in bytes, events and numbers.

    python -m tests.stress.pauses --pauses 200 --base tiny

A real server trains on the base. Every third time its worker is terminated (SIGTERM); otherwise the job is paused
and resumed. Moments are drawn from the duration of an undisturbed job, from its steps, and from around its last
step. Jobs evaluate every few steps, so that some are interrupted during an evaluation: the program counts these.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from server.jobs.files import JobFiles
from tests.end_to_end.training_client import ENDED, WORKER, get, processes, wait_until
from tests.stress.equal_jobs import Base, TrainingServer

NEXT_STEPS, LAST_STEPS = 20, 40
"""Numbers of steps from which a moment is drawn. A pause takes several steps to reach the job's process."""


@dataclass(frozen=True)
class Struck:
    """A pause that interrupted a job."""

    by_signal: bool
    step: int  # the last step taken
    in_evaluation: bool  # the evaluation after that step


def strike(training: TrainingServer, by_signal: bool, after_attempt: int = 0) -> Struck:
    """Interrupt the last job, or another one if it ends first, and let it continue."""
    while True:
        after_attempt = training.running(after_attempt)
        job_id = training.jobs[-1]
        _wait_for_a_moment(training, job_id)
        struck = _terminate(training, job_id) if by_signal else _pause(training, job_id)
        if struck is not None:
            return struck


def _wait_for_a_moment(training: TrainingServer, job_id: str) -> None:
    """Wait until a random time after the attempt's start, for one of its next steps or one of its last, or for its
    end."""
    kind, rng = training.rng.choice(["start", "step", "step", "end"]), training.rng
    if kind == "start":
        time.sleep(rng.uniform(0, training.seconds))
        return
    seq, step = _newest(training, job_id, 0)
    wanted = (
        step + rng.randint(1, NEXT_STEPS) if kind == "step" else training.num_steps - rng.randint(0, LAST_STEPS)
    )
    while step < wanted and get(training.server, f"/train/{job_id}")["status"] == "running":
        time.sleep(0.01)
        seq, newer = _newest(training, job_id, seq)
        step = max(step, newer)


def _newest(training: TrainingServer, job_id: str, seq: int) -> tuple[int, int]:
    """Return the number of the newest event, and the newest step with metrics after event `seq`; 0 if there is
    none."""
    events = get(training.server, f"/train/{job_id}/events?after={seq}")
    steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
    return (events[-1]["seq"] if events else seq), max(steps, default=0)


def _pause(training: TrainingServer, job_id: str) -> Struck | None:
    """Pause the job. Return None if it ended first."""
    if training.server.client.post(f"/train/{job_id}/pause").status_code != 200:
        return None
    wait_until(lambda: get(training.server, f"/train/{job_id}")["status"] in ("paused", *ENDED))
    if get(training.server, f"/train/{job_id}")["status"] in ENDED:
        return None
    struck = _struck(training, job_id, by_signal=False)
    response = training.server.client.post(f"/train/{job_id}/resume")
    assert response.status_code == 200, response.text
    return struck


def _terminate(training: TrainingServer, job_id: str) -> Struck | None:
    """Terminate the worker. Return None if the job ended first."""
    workers = processes(training.server, WORKER)
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    wait_until(lambda: not any(worker in processes(training.server, WORKER) for worker in workers))
    if get(training.server, f"/train/{job_id}")["status"] in ENDED:
        return None
    return _struck(training, job_id, by_signal=True)


def _struck(training: TrainingServer, job_id: str, by_signal: bool) -> Struck:
    """Return the pause as recorded by the job's checkpoint, if it has one."""
    found = JobFiles(training.home).checkpoints(job_id).glob("[0-9]*/state.json")
    states = sorted((json.loads(path.read_text()) for path in found), key=lambda state: int(state["step"]))
    if not states:
        return Struck(by_signal, 0, False)
    return Struck(by_signal, states[-1]["step"], states[-1]["unreported"] is not None)


def pause_at_random(training: TrainingServer, num_pauses: int) -> list[Struck]:
    """Interrupt jobs one after the other, every third one by a signal."""
    struck: list[Struck] = []
    for number in range(1, num_pauses + 1):
        struck.append(strike(training, by_signal=number % 3 == 0))
        how = "SIGTERM" if struck[-1].by_signal else "pause"
        where = "in the evaluation of" if struck[-1].in_evaluation else "after"
        sys.stdout.write(f"{number}: {how} {where} step {struck[-1].step} of {training.jobs[-1]}\n")
        sys.stdout.flush()
    return struck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pauses", type=int, default=200)
    parser.add_argument("--base", choices=("tiny", "real"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    base: Base = arguments.base
    with tempfile.TemporaryDirectory() as directory:
        training = TrainingServer.begin(base, Path(directory), arguments.seed)
        started = time.monotonic()
        try:
            struck = pause_at_random(training, arguments.pauses)
            training.check()
        finally:
            training.server.close()
    sys.stdout.write(
        f"{base} base: {len(struck)} pauses, {sum(one.by_signal for one in struck)} of them by SIGTERM, "
        f"{sum(one.in_evaluation for one in struck)} in a step's evaluation, "
        f"{sum(one.step == training.num_steps for one in struck)} after the last step, "
        f"during {len(training.jobs) - 1} jobs, in {time.monotonic() - started:.0f} s: "
        f"all ended in the undisturbed bytes ({training.digest[:16]}), events and numbers\n"
    )


if __name__ == "__main__":
    main()
