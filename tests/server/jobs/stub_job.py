"""A stub for `server.jobs.run_job`: it counts steps, each of which determines the next one's state.

HOME/jobs/<id>/plan.json sets: `steps`; `seconds` per step; a checkpoint `every` so many; `hang_at` a step;
`crash_at` a step in the first attempt; `deaf` to requests to leave; `hold` until the file `go` exists before
publishing; `linger` so many seconds after that, before the file `tidy` is made; `full`, a step that fails with a
full disk; `transfer` so many seconds at the first step, in one call that may take `transfer_at_most`. At each step
of `stay_at` it writes the step's number to the file `stays`, and waits until it is asked to leave or to give way,
or until `go` exists. HOME/jobs/<id>/steps gets a line for each step.
"""

import errno
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from server.system.memory import exempt_from_gc

with exempt_from_gc():  # halves the time of the imports, which is most of the stub's
    import sqlalchemy as sa

    from adapters.catalog.catalog import NewVersion
    from server.database.file import driver
    from server.jobs.leases import Claim, LeaseLost, Leases
    from server.jobs.pipe import EXIT_DONE, EXIT_LEFT, EXIT_NO_ROOM, Assignment, WorkerLink
    from server.storage.reserve import Reserve


def connect(home: Path) -> sa.Engine:
    """Connect like server.database, but without the migrations, which take longer than the whole stub."""
    url = f"sqlite:///{home.absolute()}/smolora.db"
    engine = sa.create_engine(url, module=driver, connect_args={"timeout": 15})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: driver.Connection, _: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def main() -> int:
    assignment = Assignment.from_argument(sys.argv[-1])
    link = WorkerLink(assignment)
    home = Path(str(json.loads(assignment.settings)["home"]))
    claim = Claim(assignment.job_id, assignment.token, assignment.owner)
    leases = Leases(connect(home))
    os.write(1, f"attempt {claim.token} speaking\n".encode())
    try:
        return work(home / "jobs" / claim.job_id, link, leases, claim)
    except LeaseLost:
        return 76
    except OSError as error:
        if not Reserve(home).is_disk_full(error):
            raise
        return EXIT_NO_ROOM


def work(directory: Path, link: WorkerLink, leases: Leases, claim: Claim) -> int:
    plan = json.loads((directory / "plan.json").read_text())
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(exist_ok=True)

    def checkpoint() -> None:
        beside = checkpoints / f"beside-{os.getpid()}"
        beside.write_text(state)
        beside.rename(checkpoints / f"{claim.token}-{step}")
        leases.checkpointed(claim, step)

    step, state = 0, ""
    stored = {int(path.name.split("-")[1]): path for path in checkpoints.glob("[0-9]*-*")}
    if stored:
        step = max(stored)
        state = stored[step].read_text()
    while step < plan["steps"]:
        step += 1
        if step == plan.get("hang_at"):
            time.sleep(1000)
        if step == 1 and "transfer" in plan:
            from server.jobs.reporter import beating

            with beating(link.beat, plan["transfer_at_most"], every=0.2):
                time.sleep(plan["transfer"])
        if step == plan.get("crash_at") and claim.token == 1:
            os._exit(3)
        if step == plan.get("full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(plan.get("seconds", 0.0))
        if step in plan.get("stay_at", ()):
            (directory / "stays").write_text(str(step))
            while not link.should_leave and not link.should_give_way and not (directory / "go").exists():
                link.beat()
                time.sleep(0.05)
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        with open(directory / "steps", "a") as file:
            file.write(f"{claim.token} {os.getpid()} {step}\n")
        link.beat({"step": step, "total_steps": plan["steps"]}, {"train_loss": 1 / step})
        leases.add_metrics(claim, f"step {step}", {"step": step, "train_loss": 1 / step})
        leases.flush(claim)
        if step % plan.get("every", 10) == 0:
            checkpoint()
        if (link.should_leave or link.should_give_way) and not plan.get("deaf"):
            checkpoint()
            return EXIT_LEFT
    while plan.get("hold") and not (directory / "go").exists():
        link.beat()
        time.sleep(0.01)
    adapter = NewVersion(
        name="tweets", digest=state, rank=4, alpha=8, target_modules=("q_proj",), parameters=1, bytes=1
    )
    progress: dict[str, object] = {"step": step, "total_steps": step}
    leases.succeed(
        claim, progress=progress, metrics={"train_loss": 1 / step}, report={"steps": step}, publish=adapter
    )
    if "linger" in plan:
        time.sleep(plan["linger"])
        (directory / "tidy").touch()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
