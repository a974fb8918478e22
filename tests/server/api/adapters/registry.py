"""The registry on disk, driven by commands, also as a process that is killed in the middle of one.

`python -m tests.server.api.adapters.registry FILES` reads a command as a line of JSON, forks a process that runs
it and dies at its n-th step (opening, renaming or removing a file, a lock, a commit), and reports the outcome.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
import torch

from adapters.catalog.catalog import Catalog, NewVersion
from adapters.catalog.records import Records
from adapters.expression import parse
from adapters.library import Library
from adapters.peft import files as peft_format
from adapters.store.store import AdapterStore
from server.database import FILE_NAME, connect
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.training.spec import JobSpec, TrainingSpec
from tests.adapters.samples import SHAPE, sample_adapter

NUM_SEEDS = 4
KILLED = 9
_STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "fcntl.flock"}

Op = Mapping[str, Any]


def digest_of(seed: int) -> str:
    return sample_adapter(seed).weights.digest


def write_files(directory: Path) -> None:
    """Write PEFT's two files for every seed."""
    for seed in range(NUM_SEEDS):
        (directory / str(seed)).mkdir()
        peft_format.write(directory / str(seed), sample_adapter(seed))


class Registry:
    """A server's registry, started on `home`: storage is repaired, and jobs continue."""

    def __init__(self, home: Path, files: Path) -> None:
        self.home = home
        self._files = files
        self.engine: sa.Engine = connect(home)
        self.store = AdapterStore(home / "adapters")
        records = Records(home / "adapters")
        self.jobs, self._leases = Jobs(self.engine), Leases(self.engine, records)
        self.catalog = Catalog(self.engine, records)
        self.library = Library(self.catalog, self.store, SHAPE, "tiny", self.jobs.in_use)

    def restart(self) -> None:
        self.library.recover(self.jobs.is_known)
        self.work()

    def close(self) -> None:
        self.engine.dispose()

    def do(self, op: Op) -> None:
        """Run the command. Raise the registry's refusal."""
        match op["do"]:
            case "upload":
                directory = self._files / str(op["seed"])
                config = (directory / peft_format.CONFIG_NAME).read_bytes()
                self.library.publish(op["name"], config, directory / peft_format.WEIGHTS_NAME)
            case "train":
                self.library.check_name(op["name"])
                spec = JobSpec(op["name"], training=TrainingSpec(seed=op["seed"]), alias=op["alias"])
                self.jobs.submit(spec, job_id=op["job"], data={})
                self.work()
            case "point":
                self.library.point(op["name"], op["alias"], op["version"])
            case "unpoint":
                self.library.unpoint(op["name"], op["alias"])
            case "compose":
                self.library.compose(op["name"], parse(op["expression"]))
            case "delete":
                if op["version"] is None:
                    self.library.delete(op["name"], op["force"])
                else:
                    self.library.delete_version(op["name"], op["version"], op["force"])

    def work(self) -> None:
        """Do a worker's work on the queued jobs: training takes no time here."""
        while (claim := self._leases.claim("worker", lease_seconds=-1.0)) is not None:
            spec = self.jobs.get(claim.job_id).spec
            assert isinstance(spec, JobSpec)
            adapter = sample_adapter(spec.training.seed)
            with self.store.publishing(adapter, self.catalog.in_use) as num_bytes:
                new = NewVersion(
                    name=spec.name,
                    digest=adapter.weights.digest,
                    rank=adapter.config.rank,
                    alpha=adapter.config.alpha,
                    target_modules=adapter.weights.target_modules,
                    parameters=adapter.weights.num_parameters,
                    bytes=num_bytes,
                )
                self._leases.succeed(claim, progress={}, metrics={}, report={}, publish=new, alias=spec.alias)

    def lose_database(self) -> None:
        self.close()
        for path in self.home.glob(f"{FILE_NAME}*"):
            path.unlink()


class Nursery:
    """A process that runs commands in child processes, which it kills."""

    def __init__(self, files: Path) -> None:
        command = [sys.executable, "-m", "tests.server.api.adapters.registry", str(files)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def do(self, home: Path, op: Op, step: int) -> bool:
        """Return whether the command was completed; otherwise it was killed at that step."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"home": str(home), "op": op, "step": step}) + "\n")
        stdin.flush()
        code = int(stdout.readline())
        assert code in (0, KILLED), f"it ended with {code}"
        return code == 0

    def close(self) -> None:
        self._process.communicate()


def _main(files: Path) -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                registry = Registry(Path(order["home"]), files)
                _die_at(registry, order["step"])
                registry.do(cast("Op", order["op"]))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _die_at(registry: Registry, last: int) -> None:
    """Die as by kill -9 before the `last` step from now."""
    count = 0

    def step(*_: object) -> None:
        nonlocal count
        count += 1
        if count == last:
            os._exit(KILLED)

    def heard(event: str, arguments: tuple[object, ...]) -> None:
        if event == "fcntl.flock" or (event in _STEPS and str(arguments[0]).startswith(str(registry.home))):
            step()

    sa.event.listen(registry.engine, "commit", step)
    sys.addaudithook(heard)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
