"""How busy the writers' lock of PostgreSQL is: `python -m benchmarks.writers --database URL`.

Simulates what servers and workers write: the usage of answers over many adapters, and trainings that report their
steps and renew their leases. It uses the server's own code, and a database that must be empty. The share of time
for which the lock is held is sampled from pg_locks.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sqlalchemy as sa

from adapters.errors import Unavailable
from adapters.sql import reader_of
from server.access.usage import FLUSH_SECONDS, Ledger, Usage
from server.database import connect
from server.jobs.leases import Claim, LeaseLost, Leases
from server.jobs.tables import jobs
from server.jobs.worker import Timing

_SAMPLE_SECONDS = 0.005
_HELD = sa.text(
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = "
    "(SELECT oid FROM pg_database WHERE datname = current_database())"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the simulation, print its figures, and return 1 if a lease was lost or the lock was too busy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", required=True, help="the URL of an empty PostgreSQL database")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--answers", type=float, default=1000.0, help="answers a second")
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--servers", type=int, default=4, help="API processes that store usage")
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--steps", type=float, default=2.0, help="steps a second of each worker")
    given = parser.parse_args(arguments)
    engine = connect(Path(tempfile.mkdtemp(prefix="smolora-writers-")), url=given.database)
    claims = _claims(engine, given.workers)
    over, failed = threading.Event(), list[str]()

    def until_over(seconds: float, work: Callable[[], object]) -> None:
        over.wait(random.random() * seconds)
        while not over.wait(seconds):
            try:
                work()
            except LeaseLost:
                return
            except Unavailable as error:
                failed.append(type(error).__name__)

    def serve() -> None:
        ledger, num = Ledger(engine), round(given.answers * FLUSH_SECONDS / given.servers)

        def flush() -> None:
            for _ in range(num):
                adapter = f"adapter-{random.randrange(given.adapters)}"
                ledger.add("default", "key", adapter, Usage(1, 100, 50, 30))
            ledger.flush()

        until_over(FLUSH_SECONDS, flush)

    def train(claim: Claim) -> None:
        leases, step = Leases(engine), 0

        def run_step() -> None:
            nonlocal step
            step += 1
            leases.add_metrics(claim, f"step {step}", {"step": step, "train_loss": 1.0})

        until_over(1 / given.steps, run_step)

    def renew(claim: Claim) -> None:
        leases = Leases(engine)
        until_over(Timing.heartbeat, lambda: leases.heartbeat(claim))

    with ThreadPoolExecutor(given.servers + 2 * given.workers) as pool:
        for _ in range(given.servers):
            pool.submit(serve)
        for claim in claims:
            pool.submit(train, claim)
            pool.submit(renew, claim)
        busy, num_samples = _sampled(engine, given.seconds)
        over.set()
    with reader_of(engine).connect() as connection:
        now = sa.func.extract("epoch", sa.func.clock_timestamp())
        lost = connection.execute(sa.select(jobs.c.id).where(jobs.c.lease_until < now)).all()
        steps = connection.execute(sa.select(sa.func.sum(jobs.c.metrics_step))).scalar_one()
        fsync = connection.exec_driver_sql("SHOW fsync").scalar_one()
    requests = Ledger(engine).rows(None, None, ())[0]["requests"]
    engine.dispose()
    print(f"fsync {fsync}; {requests} answers, {steps} steps of {given.workers} workers in {given.seconds:g} s")
    print(f"the writers' lock was held in {busy:.1%} of {num_samples} samples (wanted: at most 20 %)")
    print(f"leases lost: {len(lost)}; writes that failed: {len(failed)}")
    return int(busy > 0.2 or bool(lost))


def _claims(engine: sa.Engine, num: int) -> list[Claim]:
    """Create jobs, and return a claim of each."""
    with engine.begin() as connection:
        for number in range(num):
            connection.execute(
                sa.insert(jobs).values(
                    id=f"job-{number}",
                    name=f"job-{number}",
                    status="queued",
                    spec={},
                    data={},
                    progress={},
                    metrics={},
                    created_at=sa.func.now(),
                    token=0,
                    lease_until=0.0,
                    wants_pause=False,
                    stalled_attempts=0,
                    checkpoint_step=-1,
                    metrics_step=-1,
                    num_events=0,
                )
            )
    found = [Leases(engine).claim(f"worker-{number}", lease_seconds=60.0) for number in range(num)]
    return [claim for claim in found if claim is not None]


def _sampled(engine: sa.Engine, seconds: float) -> tuple[float, int]:
    """Return the share of samples in which the writers' lock was held, and the number of samples."""
    held = num = 0
    until = time.monotonic() + seconds
    with reader_of(engine).connect() as connection:
        while time.monotonic() < until:
            held += bool(connection.execute(_HELD).scalar_one())
            num += 1
            time.sleep(_SAMPLE_SECONDS)
    return held / num, num


if __name__ == "__main__":
    sys.exit(main())
