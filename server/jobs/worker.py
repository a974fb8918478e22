"""The worker: claim one job after another and run each in a process of its own, which has its own memory.

A worker has two lanes, each with its own thread: one trains and evaluates, and one merges. So a merge, which takes
seconds, never waits for a training.

The worker itself stays small and never blocks. A training step may take longer than a lease, so a separate thread
renews the lease. The worker asks the process to exit if the job is paused or the worker is stopped, and to exit
after its current step if the job gives way to another project's job. It kills the process if the job was cancelled
or another worker has it, or if the process shows no progress.

If the base can't be loaded, the worker exits, and jobs wait for a worker that can load it. If the database, the
object store or this machine's disk fails, the worker requeues the job and waits. But if the disk is full and no
other machine could have room, the job fails. Only the process loads the training code
(`server.jobs.run_job`). The worker and the process communicate through `server.jobs.pipe`.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from server.config import WorkerSettings
from server.database import WORKER_PATIENCE_SECONDS, agree, connect, is_file
from server.errors import StartupError
from server.jobs.attempt import Attempt
from server.jobs.files import JobFiles, Retention
from server.jobs.jobs import Jobs, Status
from server.jobs.leases import LEASE_SECONDS, MAX_CRASH_DELAY, Claim, Directive, LeaseLost, Leases
from server.jobs.pipe import (
    EXIT_DONE,
    EXIT_LEFT,
    EXIT_NO_BASE,
    HINDRANCES,
    NO_ROOM,
    Child,
    end_with_parent,
    has_lost_parent,
)
from server.jobs.presence import announced
from server.jobs.supervisor import own_name, present
from server.jobs.tables import MERGE, TRAIN, Lane
from server.storage.places import Storage
from server.storage.reserve import DISK_FULL, Reserve, once_unlocked
from server.telemetry import logs

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

COMMAND = (sys.executable, "-P", "-m", "server.jobs")
NICENESS = 14
"""The niceness of a worker. While requests run, a job keeps about a quarter of its speed (docs/performance.md)."""
NO_BASE_EVENT = "a worker can't load the base: its log says why, and the job waits for one that can"

_TICK_SECONDS = 0.05

log = logging.getLogger("smolora.worker")


@dataclass(frozen=True)
class Timing:
    """A worker's intervals and timeouts, in seconds."""

    lease: float = LEASE_SECONDS
    heartbeat: float = 2.5  # between renewals of the lease
    directive: float = 0.25  # between reads of the job's directive
    poll: float = 0.5  # between polls of the queue
    hung: float = 300.0  # without progress, after which the process is killed
    leave: float = 20.0  # for a process to checkpoint and leave before it is killed, if the worker has to end
    pause: float = 120.0  # the same if the worker keeps running, and for a process to clean up after its job's end
    max_crash_delay: float = MAX_CRASH_DELAY
    trouble: float = 2.0  # of waiting after the worker failed, for example because of the database
    hindered: float = 30.0  # until the next attempt after a failure that isn't the job's fault
    sweep: float = 600.0  # between removals of ended jobs' files


class Worker:
    """Claims jobs of a lane and runs one at a time. A worker process has one of these for each lane.

    The thread that calls `run` must outlive the jobs' processes that it starts. Any thread may call `stop`.
    """

    def __init__(
        self,
        home: Path,
        jobs: Jobs,
        leases: Leases,
        settings: str,
        *,
        command: Sequence[str] = COMMAND,
        timing: Timing | None = None,
        parent: int | None = None,
        lane: Lane | None = None,
        bucket: "Bucket | None" = None,
        has_peers: bool = False,
    ) -> None:
        """`command` runs a job, and receives `settings`, the JSON of WorkerSettings.

        The worker exits when the process `parent` dies. If `lane` is None, it claims jobs of every lane. If
        `has_peers`, workers with other HOMEs may have room for a job that doesn't fit on this worker's disk.
        """
        self._leases = leases
        self._settings = settings
        self._command = command
        self._timing = timing or Timing()
        self._parent = parent
        self._lane = lane
        self._files = JobFiles(home, bucket)
        self._retention = Retention(home, jobs, bucket)
        self._has_peers = has_peers
        self._reserve = Reserve(home)
        self._owner = own_name()
        self._sweep_due = time.monotonic() + self._timing.sweep
        self._is_stopping = False
        self._exit_code = 0

    def stop(self) -> None:
        """Make `run` return once the current job is released. This is safe in a signal handler."""
        self._is_stopping = True

    def run(self) -> int:
        """Run jobs until `stop` is called or the base can't be loaded. Return the exit code: 0 or EXIT_NO_BASE."""
        self._try(self._retention.sweep)
        while not self._is_stopping:
            self._try(self._work)
        return self._exit_code

    def _try(self, work: Callable[[], None]) -> None:
        """Run `work`. If it raises, log the error and wait, since the database or the disk may recover."""
        try:
            work()
        except Exception:
            log.exception("the worker failed; it tries again")
            self._sleep(self._timing.trouble)

    def _work(self) -> None:
        has_room = self._reserve.fill() and not self._reserve.is_needed
        if time.monotonic() >= self._sweep_due:
            self._sweep_due = time.monotonic() + self._timing.sweep  # first: a failing sweep isn't retried at once
            self._retention.sweep()
        if self._has_peers and not has_room:
            log.warning("SMOLORA_HOME has no room, or can't be written: this worker takes no jobs")
            self._sleep(self._timing.hindered)
            return
        claim = self._leases.claim(self._owner, self._timing.lease, self._lane)
        if claim is None:
            self._sleep(self._timing.poll)
        else:
            self._work_on(claim)

    def _work_on(self, claim: Claim) -> None:
        """Run one attempt at a job to its end."""
        log.info("job %s: attempt %d", claim.job_id, claim.token)
        timing = self._timing
        attempt = Attempt(
            self._leases, claim, lease=timing.lease, heartbeat=timing.heartbeat, look=timing.directive
        )
        try:
            child = Child(
                self._command,
                self._files.log(claim.job_id),
                job_id=claim.job_id,
                token=claim.token,
                owner=claim.owner,
                settings=self._settings,
            )
        except OSError as error:
            if self._has_peers and self._reserve.is_disk_full(error):
                attempt.hindrance = NO_ROOM
            self._conclude(attempt, f"could not start: {error.strerror}")
            return
        try:
            with attempt:
                reason = self._watch(child, attempt)
        finally:
            child.close()
        self._conclude(attempt, reason)

    def _watch(self, child: Child, attempt: Attempt) -> str | None:
        """Wait for the job's process to end, or kill it. Return why the attempt failed, or None if it didn't."""
        timing = self._timing
        quiet = leaving = 0.0
        is_killed = False  # by this worker
        before = time.monotonic()
        while (code := child.wait(_TICK_SECONDS)) is None:
            now = time.monotonic()
            elapsed = min(
                now - before, 1.0
            )  # if this worker was suspended, that time says nothing about the process
            before = now
            quiet = 0.0 if child.listen() else quiet + elapsed
            attempt.note(child.progress, child.metrics)
            if self._parent is not None and has_lost_parent(self._parent):
                child.close()
                os._exit(1)
            patience = timing.leave if self._is_stopping else timing.pause
            if attempt.is_void or leaving > patience or quiet > timing.hung:
                child.kill()
                is_killed = True
            elif attempt.directive is Directive.ENDED:
                leaving += elapsed
            elif attempt.directive is Directive.PAUSE or self._is_stopping:
                if not attempt.should_leave:
                    attempt.should_leave = True
                    child.ask_to_leave()
                leaving += elapsed
            elif attempt.directive is Directive.GIVE_WAY and not attempt.gives_way and child.progress is not None:
                attempt.gives_way = True
                child.ask_to_give_way()
        child.listen()
        attempt.note(child.progress, child.metrics)
        if code == EXIT_DONE:
            return None
        if code == EXIT_NO_BASE:
            self._end_without_base(attempt.claim, child.reason)
        if code in (EXIT_LEFT, EXIT_NO_BASE):
            attempt.should_leave = True
        if code in HINDRANCES:
            attempt.hindrance = HINDRANCES[code]
            return f"{attempt.hindrance}: {child.reason}" if child.reason else attempt.hindrance
        if quiet > timing.hung:
            return f"no sign of progress for {timing.hung:g} s"
        if code >= 0:
            return f"ended with exit code {code}"
        why = ", as Linux does where memory runs out" if -code == signal.SIGKILL and not is_killed else ""
        return f"killed by {signal.Signals(-code).name}{why}"

    def _end_without_base(self, claim: Claim, reason: str | None) -> None:
        log.error(
            "the base can't be loaded, so this worker ends, and jobs wait: %s", reason or "see the job's log"
        )
        self._exit_code = EXIT_NO_BASE
        self.stop()
        self._store(lambda: self._leases.add_event(claim, NO_BASE_EVENT, level="warning"))

    def _conclude(self, attempt: Attempt, reason: str | None) -> None:
        """Store how the attempt ended, unless its process has done so, and clean up. `reason`: why it failed."""
        leases, claim = self._leases, attempt.claim
        status = leases.status(claim.job_id)
        if not attempt.is_void and status is not None and not status.has_ended:
            self._store(attempt.keep)
            if self._reserve.is_needed and not attempt.should_leave:
                attempt.hindrance = NO_ROOM
            if attempt.hindrance == NO_ROOM and not self._has_peers:
                self._store(lambda: leases.fail(claim, DISK_FULL))
            elif attempt.should_leave:
                after = attempt.seconds if attempt.gives_way else None
                self._store(lambda: leases.release(claim, gave_way_after=after))
            elif attempt.hindrance:
                crash = DISK_FULL if attempt.hindrance == NO_ROOM else ""
                delay = self._timing.hindered + 2 * self._timing.poll  # so that another job is claimed first
                self._store(lambda: leases.release(claim, attempt.hindrance, delay, crash))
            else:
                reason = reason or "ended without a result"
                self._store(lambda: leases.crashed(claim, reason, self._timing.max_crash_delay))
            status = leases.status(claim.job_id)
        log.info("job %s: %s%s", claim.job_id, status, f" ({reason})" if reason else "")
        if status is not None and status.has_ended:
            self._files.drop_checkpoints(claim.job_id)
            if status is not Status.SUCCEEDED:
                self._files.drop_model(claim.job_id)  # of an attempt that kept it, and then ended too late
        elif attempt.hindrance:
            self._sleep(self._timing.hindered)

    def _store(self, write: Callable[[], object]) -> None:
        try:
            once_unlocked(lambda: self._reserve.spend_on(write), lambda: not self._is_stopping)
        except LeaseLost:
            log.warning("the job is another worker's by now")

    def _sleep(self, seconds: float) -> None:
        """Sleep, but return early if the worker is stopped. An Event would deadlock if a signal handler set it."""
        until = time.monotonic() + seconds
        while not self._is_stopping and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _TICK_SECONDS))
            if self._parent is not None and has_lost_parent(self._parent):
                os._exit(1)


def run_worker(settings: WorkerSettings, parent: int | None = None, command: Sequence[str] = COMMAND) -> int:
    """Run a worker until SIGTERM or SIGINT, or until the process `parent` dies. Return the exit code.

    Raise StartupError if the database or the object store can't be opened.
    """
    if parent is not None:
        end_with_parent(parent)
    engine = connect(settings.home, url=settings.database, patience=WORKER_PATIENCE_SECONDS)
    os.nice(NICENESS)
    jobs, leases = Jobs(engine), Leases(engine, time_slice=settings.train_slice)
    storage = Storage.open(settings.home, settings)
    agree(engine, storage.place)
    has_peers = storage.bucket is not None and not is_file(engine)  # otherwise all workers share this HOME
    make = partial(
        Worker,
        settings.home,
        jobs,
        leases,
        settings.to_json(),
        command=command,
        parent=parent,
        bucket=storage.bucket,
    )
    lanes = [make(lane=lane, has_peers=has_peers) for lane in (TRAIN, MERGE)]
    codes = list[int]()

    def stop(*_: object) -> None:
        for lane in lanes:
            lane.stop()

    def run(lane: Worker) -> None:
        codes.append(lane.run())
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    training, merging = lanes
    # The kernel kills a process when the thread that started it ends, so each lane keeps its thread.
    second = threading.Thread(target=run, args=(merging,), name="merging", daemon=True)
    second.start()
    with present(settings.home), announced(engine):
        run(training)
        second.join()
    engine.dispose()
    return max(codes)


def main(settings: str, parent: str) -> int:
    """Run a worker that the process `parent` supervises. `settings` is JSON. Return the exit code."""
    os.umask(0o077)
    read = WorkerSettings.model_validate_json(settings)
    logs.set_up(read.log_format)
    try:
        return run_worker(read, int(parent))
    except StartupError as error:
        log.critical("%s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
