"""Pauses at random moments; every job ends as one that nobody disturbed, in bytes, events and numbers.

    python -m tests.stress.pauses --pauses 200 --base tiny

A real server trains on the base. Every third time its worker is told to end (SIGTERM), else the job is paused, and
resumed. Moments are drawn from the time that an undisturbed job takes, from its steps, and from around the last
one. Jobs evaluate every few steps, so that some are struck in an evaluation: the program counts them.
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
from tests.stress.equal_jobs import Base, Drill

NEXT_STEPS, LAST_STEPS = 20, 40
"""Of how many a moment is drawn. It takes some, too, until a pause has reached the job's process."""


@dataclass(frozen=True)
class Struck:
    """A pause that interrupted a job."""

    by_signal: bool
    step: int  # the last one that was taken
    in_evaluation: bool  # of that step


def strike(drill: Drill, by_signal: bool, after_attempt: int = 0) -> Struck:
    """Interrupt the last job, or another one where it ends too soon, and have it go on."""
    while True:
        after_attempt = drill.running(after_attempt)
        job_id = drill.jobs[-1]
        _wait_for_a_moment(drill, job_id)
        struck = _terminate(drill, job_id) if by_signal else _pause(drill, job_id)
        if struck is not None:
            return struck


def _wait_for_a_moment(drill: Drill, job_id: str) -> None:
    """Some time after the attempt's start, one of its next steps, or one of the last; or when it has ended."""
    kind, rng = drill.rng.choice(["start", "step", "step", "end"]), drill.rng
    if kind == "start":
        time.sleep(rng.uniform(0, drill.seconds))
        return
    seq, step = _newest(drill, job_id, 0)
    wanted = step + rng.randint(1, NEXT_STEPS) if kind == "step" else drill.num_steps - rng.randint(0, LAST_STEPS)
    while step < wanted and get(drill.server, f"/train/{job_id}")["status"] == "running":
        time.sleep(0.01)
        seq, newer = _newest(drill, job_id, seq)
        step = max(step, newer)


def _newest(drill: Drill, job_id: str, seq: int) -> tuple[int, int]:
    """The number of its newest event, and the newest step whose metrics came after event `seq`; 0: none."""
    events = get(drill.server, f"/train/{job_id}/events?after={seq}")
    steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
    return (events[-1]["seq"] if events else seq), max(steps, default=0)


def _pause(drill: Drill, job_id: str) -> Struck | None:
    """None where the job ended before."""
    if drill.server.client.post(f"/train/{job_id}/pause").status_code != 200:
        return None
    wait_until(lambda: get(drill.server, f"/train/{job_id}")["status"] in ("paused", *ENDED))
    if get(drill.server, f"/train/{job_id}")["status"] in ENDED:
        return None
    struck = _struck(drill, job_id, by_signal=False)
    response = drill.server.client.post(f"/train/{job_id}/resume")
    assert response.status_code == 200, response.text
    return struck


def _terminate(drill: Drill, job_id: str) -> Struck | None:
    """Likewise."""
    workers = processes(drill.server, WORKER)
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    wait_until(lambda: not any(worker in processes(drill.server, WORKER) for worker in workers))
    if get(drill.server, f"/train/{job_id}")["status"] in ENDED:
        return None
    return _struck(drill, job_id, by_signal=True)


def _struck(drill: Drill, job_id: str, by_signal: bool) -> Struck:
    """As the checkpoint says that the job left behind, where it had come to one."""
    found = JobFiles(drill.home).checkpoints(job_id).glob("[0-9]*/state.json")
    states = sorted((json.loads(path.read_text()) for path in found), key=lambda state: int(state["step"]))
    if not states:
        return Struck(by_signal, 0, False)
    return Struck(by_signal, states[-1]["step"], states[-1]["unreported"] is not None)


def pause_at_random(drill: Drill, num_pauses: int) -> list[Struck]:
    """One after the other, every third one by a signal."""
    struck: list[Struck] = []
    for number in range(1, num_pauses + 1):
        struck.append(strike(drill, by_signal=number % 3 == 0))
        how = "SIGTERM" if struck[-1].by_signal else "pause"
        where = "in the evaluation of" if struck[-1].in_evaluation else "after"
        sys.stdout.write(f"{number}: {how} {where} step {struck[-1].step} of {drill.jobs[-1]}\n")
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
        drill = Drill.begin(base, Path(directory), arguments.seed)
        started = time.monotonic()
        try:
            struck = pause_at_random(drill, arguments.pauses)
            drill.check()
        finally:
            drill.server.close()
    sys.stdout.write(
        f"{base} base: {len(struck)} pauses, {sum(one.by_signal for one in struck)} of them by SIGTERM, "
        f"{sum(one.in_evaluation for one in struck)} in a step's evaluation, "
        f"{sum(one.step == drill.num_steps for one in struck)} after the last step, "
        f"during {len(drill.jobs) - 1} jobs, in {time.monotonic() - started:.0f} s: "
        f"all ended in the undisturbed bytes ({drill.digest[:16]}), events and numbers\n"
    )


if __name__ == "__main__":
    main()
