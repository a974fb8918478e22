"""A whole cluster on this machine, as started by `smolora cluster up`: PostgreSQL, an object store behind a proxy
that may fail, Ray with engine replicas, API processes, a worker, and a second worker with its own HOME."""

import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import httpx
import psutil

from adapters.lora import BaseShape
from server.access.keys import Keys
from server.access.principal import DEFAULT_SCOPES, OPERATOR, SCOPES, Scope
from server.cluster.node import read_state
from server.config.environment import set_up_ray
from server.database import connect
from server.errors import StartupError
from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from server.storage.home import Home
from tests.cluster.kit import TITLE
from tests.end_to_end.server_process import PATIENCE, command, environment, free_port
from tests.end_to_end.training_client import CHILD, ENDED, WORKER, wait_until
from tests.kits.buckets import BUCKET, Proxy, aws_variables, running_store
from tests.kits.native import lend_native
from tests.kits.postgres import Postgres
from tests.server.api.adapters.peft_files import as_parts, peft_files

Part = Literal["replica", "api", "worker", "job", "controller", "gcs_server", "raylet"]
_CLI = "server.cli"
_CONTROLLER = "ray::ServeController"


class Whole:
    """A ready cluster. `urls` are the API processes', and `operator` is the secret of a key with all scopes."""

    def __init__(
        self, directory: Path, model: Path, num_apis: int = 2, num_replicas: int = 2, **flags: object
    ) -> None:
        self.directory = directory
        self.home = directory / "machine"
        self._ends = ExitStack()
        self._log = directory / "log"
        self._flags = flags
        self._model = model
        try:
            self._start(num_apis, num_replicas)
        except BaseException:
            self.close()
            raise

    def _start(self, num_apis: int, num_replicas: int) -> None:
        set_up_ray()
        self.postgres = Postgres()
        self._ends.callback(self.postgres.close)
        self.proxy = Proxy(*self._ends.enter_context(running_store()))
        self._ends.callback(self.proxy.close)
        self.database_url = self.postgres.url(self.postgres.new())
        self.bytes_url = f"s3://{BUCKET}/whole"
        self.secrets = {
            **aws_variables(self.proxy.url),
            "SMOLORA_DATABASE_URL": self.database_url,
            "SMOLORA_BYTES_URL": self.bytes_url,
        }
        self._homes = [self.home, *(self.home / f"api-{number}" for number in range(num_apis)), self.elsewhere]
        for home in self._homes:
            home.mkdir(parents=True)
            lend_native(home)
        self.database = connect(self.home, url=self.database_url)
        self._ends.callback(self.database.dispose)
        self.operator = self.key("operator", scopes=SCOPES)
        port = free_port(num_apis)
        self.urls = [f"http://127.0.0.1:{port + number}" for number in range(num_apis)]
        self._up_flags = {"port": port, "ray_port": free_port(), "api": num_apis, "replicas": num_replicas}
        self.start_up()
        self._ends.callback(self._end_up)
        wait_until(self.is_ready, 3 * PATIENCE, "the cluster")
        self.second_worker = self.start_worker()

    @property
    def elsewhere(self) -> Path:
        """HOME of the second worker."""
        return self.directory / "elsewhere"

    @property
    def shape(self) -> BaseShape:
        """The shape of the base."""
        return load_base(resolve_base(str(self._model), self.home)).config.shape

    def key(self, name: str, project: str = "default", scopes: Sequence[Scope] = DEFAULT_SCOPES) -> str:
        """Create a key; return its secret."""
        keys = Keys(self.database, Home(self.home).keyed)
        return keys.create(name, who=OPERATOR, project=project, scopes=scopes)[1]

    def client(self, number: int, key: str | None = None) -> httpx.Client:
        """Return a client of one of the API processes."""
        headers = {"Authorization": f"Bearer {key or self.operator}"}
        return httpx.Client(base_url=self.urls[number], headers=headers, timeout=PATIENCE, trust_env=False)

    def publish(self, number: int, name: str, seed: int) -> httpx.Response:
        """Publish a random adapter, determined by the seed, through one of the API processes."""
        with self.client(number) as client:
            return client.post(f"/adapters/{name}", files=as_parts(*peft_files(seed, shape=self.shape)))

    def wait_for_job(self, number: int, job_id: str) -> None:
        """Wait until the job has succeeded, according to one of the API processes."""
        found: dict[str, str] = {}

        def has_ended() -> bool:
            with self.client(number) as client:
                found.update(client.get(f"/train/{job_id}").json())
            return found["status"] in ENDED

        wait_until(has_ended, PATIENCE, job_id)
        assert found["status"] == "succeeded", found["error"]

    def start_up(self) -> None:
        """Start `smolora cluster up`, also after it was killed."""
        flags = {"home": self.home, "model": self._model, "cpus": 8, "workers": 1, **self._up_flags, **self._flags}
        self.up = self._run("cluster", "up", **flags)

    def deploy(self) -> None:
        """Run `smolora cluster deploy` without flags. Raise AssertionError if it fails."""
        address = f"127.0.0.1:{self._up_flags['ray_port']}"
        process = self._run("cluster", "deploy", home=self.home, address=address)
        assert process.wait(PATIENCE) == 0, self.log()[-3000:]

    def start_worker(self) -> "subprocess.Popen[bytes]":
        """Start the second worker."""
        kept = {name: value for name, value in self._flags.items() if name in ("device", "dtype", "native")}
        worker = self._run("worker", home=self.elsewhere, model=self._model, **kept)
        self._ends.callback(self._end, worker)
        return worker

    def is_ready(self) -> bool:
        """Return whether all API processes are ready."""
        assert self.up.poll() is None, self.log()
        return all(self.is_api_ready(number) for number in range(len(self.urls)))

    def is_api_ready(self, number: int) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.urls[number]}/ready", timeout=5, trust_env=False).status_code == 200
        return False

    def parts(self, part: Part) -> list[psutil.Process]:
        """Return the running processes of that kind, including the second worker's and its jobs'."""
        roots = [self.up.pid, *self._ray()]
        if self.second_worker.poll() is None:
            roots.append(self.second_worker.pid)
        found = dict[int, psutil.Process]()
        for root in roots:
            with suppress(psutil.NoSuchProcess):
                above = psutil.Process(root)
                family = (above, *above.children(recursive=True))
                found.update({process.pid: process for process in family if _is(process, part)})
        return [process for _, process in sorted(found.items())]

    def _ray(self) -> list[int]:
        """Return Ray's process, which isn't a child of an `up` that has taken it over."""
        with suppress(StartupError):
            return [read_state(self.home).ray_pid]
        return []

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Stop everything."""
        self.proxy.fail("")
        self._ends.close()

    def _run(self, *words: str, **flags: object) -> "subprocess.Popen[bytes]":
        called = command(words, **flags)
        if "workers" not in flags:
            called.remove("--workers=0")
        variables = {name: value for name, value in environment().items() if not name.startswith("AWS_")}
        with self._log.open("ab") as log:
            return subprocess.Popen(
                called, env=variables | self.secrets, stdout=log, stderr=log, start_new_session=True
            )

    def _end_up(self) -> None:
        ray = self._ray()
        self._end(self.up)
        for pid in ray:
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                for one in (*root.children(recursive=True), root):
                    with suppress(psutil.NoSuchProcess):
                        one.kill()

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill it and all its child processes; test_up.py tests the regular end."""
        if process.poll() is not None:
            return
        for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def _is(process: psutil.Process, part: Part) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        words = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    if not words:
        return False
    if part in ("replica", "controller"):
        return bool(words[0].startswith(TITLE if part == "replica" else _CONTROLLER))
    if part in ("gcs_server", "raylet"):
        return Path(words[0]).name == part
    if part == "job":
        return CHILD in words
    if part == "worker" and WORKER in words:
        return True
    names = _CLI in words or Path(words[1] if len(words) > 1 else "").name == "smolora"
    return names and ("api" in words if part == "api" else "worker" in words)
