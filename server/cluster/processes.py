"""`smolora cluster up`: starts and supervises the API processes and workers of one machine."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from server.cluster import node
from server.cluster.node import ClusterState, alone, read_state, remove_state, write_state
from server.config import Settings, to_flags
from server.errors import StartupError
from server.jobs.supervisor import GRACE_SECONDS, Supervisor, worker_command
from server.serve.address import bind, refuse_strangers, url_of

_API_GRACE_SECONDS = 45.0  # more than a server takes to drain
READY_SECONDS = 180.0  # for a restarted API process to become ready
_PAUSE_SECONDS = 5.0  # for a load balancer to see that an API process is ready again
_TICK_SECONDS = 0.2
_RETRY_SECONDS = 5.0  # between attempts to start Ray again
_MAX_PORT = 65535
_RESTART = signal.SIGUSR1
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # reaches our processes without a proxy


def up(
    settings: Settings,
    scale: Mapping[str, Any] | None,
    num_apis: int,
    address: str | None,
    ray_port: int,
    num_cpus: float | None,
    say: Callable[[str], None],
) -> int:
    """Start Ray, engine replicas, API processes and workers, and supervise them until a signal.

    If `address` is given, this machine joins the Ray cluster there. `scale` are fields of `Scale`; if it is None,
    engine replicas aren't started or changed. If Ray ends, it is started again while API processes and workers go
    on. Return the exit code.
    """
    home = settings.home.absolute()
    with alone(home) as former:
        _check(settings, num_apis, address, ray_port)
        signal.signal(signal.SIGTERM, _give_up)  # until everything has started
        ray = RayPart(home / node.LOG_NAME, address, ray_port, num_cpus, say)
        ray.begin(former)
        processes = Processes({}, [])
        try:
            urls = urls_of(settings, num_apis)
            apis = {url: api_command(settings, index, num_apis, ray.address) for index, url in enumerate(urls)}
            processes = Processes(apis, [worker_command(settings.of_a_worker)] * settings.workers)
            stopped, asked = threading.Event(), threading.Event()
            signal.signal(_RESTART, lambda *_: asked.set())
            state = ClusterState(
                *(ray.address, os.getpid(), ray.pid, urls, settings.workers),
                mark=node.mark_of(os.getpid()),
                ray_mark=ray.mark,
                is_head=address is None,
            )
            write_state(home, state)
            if scale is not None:
                say("starting engine replicas")
                command = deploy_command(settings, ray.address, scale, forget=address is None)
                if not _deploy(command, ray, threading.Event()):
                    return 1
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopped.set())
            processes.start()
            awaited = list(urls)
            while not stopped.wait(_TICK_SECONDS):
                if not ray.is_alive():
                    say("Ray has ended: it is started again. Until then the API answers 503, and workers go on")
                    if not ray.revive(stopped):
                        continue
                    state = replace(state, ray_pid=ray.pid, ray_mark=ray.mark)
                    write_state(home, state)
                    if address is None:
                        _keep_deploying(deploy_command(settings, ray.address, {}), ray, stopped, say)
                for url in filter(is_ready, tuple(awaited)):
                    awaited.remove(url)
                    say(f"the API is ready at {url}")
                if asked.is_set():
                    asked.clear()
                    fault = processes.replace(stopped, say)
                    state = replace(state, num_restarts=state.num_restarts + 1, fault=fault)
                    write_state(home, state)
            return 0
        finally:
            say("stopping: requests end, jobs go back to the queue")
            processes.stop()
            ray.stop()
            remove_state(home)


class RayPart:
    """This machine's part of the Ray cluster: the head if `join` is None, else a node of the cluster there."""

    def __init__(
        self, log: Path, join: str | None, port: int, num_cpus: float | None, say: Callable[[str], None]
    ) -> None:
        self.address = join or f"127.0.0.1:{port}"
        self.pid = 0
        self.mark = ""
        self._start: Callable[[threading.Event | None], node.Process]
        if join is None:
            self._start = lambda stopped: node.start_head(port, log, num_cpus, stopped)[0]
        else:
            self._start = lambda stopped: node.start_node(join, log, num_cpus, stopped)
        self._process: node.Process | None = None
        self._is_head = join is None
        self._say = say

    def begin(self, former: ClusterState | None) -> None:
        """Start Ray, or take over the Ray of a former `smolora cluster up` that was killed.

        Raise StartupError if Ray doesn't start.
        """
        if former is not None and (former.address, former.is_head) == (self.address, self._is_head):
            self._say("smolora cluster up was killed: taking over the Ray that it started")
            self.pid, self.mark = former.ray_pid, former.ray_mark
            return
        if former is not None:
            node.end(former.ray_pid, mark=former.ray_mark)
        self._say("starting Ray" if self._is_head else f"joining Ray at {self.address}")
        self._take(self._start(None))

    def revive(self, stopped: threading.Event) -> bool:
        """Start Ray again, and try until it starts. Return False if `stopped` is set meanwhile."""
        fault = ""
        while not stopped.is_set():
            try:
                self._take(self._start(stopped))
                return True
            except StartupError as error:
                if str(error) != fault and not stopped.is_set():
                    fault = str(error)
                    self._say(f"{fault}: trying again")
            stopped.wait(_RETRY_SECONDS)
        return False

    def is_alive(self) -> bool:
        return node.is_alive(self.pid, self.mark)

    def stop(self) -> None:
        node.end(self.pid, mark=self.mark)

    def _take(self, process: node.Process) -> None:
        self._process = process  # so that it is reaped after it has ended
        self.pid, self.mark = process.pid, node.mark_of(process.pid)


def deploy_command(
    settings: Settings, address: str, scale: Mapping[str, Any], *, forget: bool = False
) -> list[str]:
    """Return the command that deploys the replicas, by default as they were deployed the last time.

    The command is a process of its own, since Ray ends processes that have joined it when its head is lost.
    """
    names = {
        "replicas": "replicas",
        "most": "max-replicas",
        "num_cpus": "replica-cpus",
        "num_gpus": "replica-gpus",
    }
    flags = [f"--address={address}", *(f"--{names[name]}={value:g}" for name, value in scale.items())]
    home = [f"--home={settings.home}"]
    own = to_flags(settings, settings.model_fields_set - {"home"}) if scale or forget else []
    forgetting = ["--forget"] if forget else []
    return [sys.executable, "-P", "-m", "server.cli", "cluster", "deploy", *flags, *forgetting, *home, *own]


def _deploy(command: Sequence[str], ray: RayPart, stopped: threading.Event) -> bool:
    """Run the command until it ends. Return whether it succeeded. Stop it if Ray ends or `stopped` is set."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 it is ours
    try:
        while process.poll() is None:
            if stopped.wait(_TICK_SECONDS) or not ray.is_alive():
                return False
        return process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _keep_deploying(
    command: Sequence[str], ray: RayPart, stopped: threading.Event, say: Callable[[str], None]
) -> None:
    """Run the command until it succeeds, Ray ends, or `stopped` is set."""
    while not _deploy(command, ray, stopped) and ray.is_alive() and not stopped.is_set():
        say("the engine replicas weren't deployed: trying again")
        stopped.wait(_RETRY_SECONDS)


def _give_up(*_: object) -> None:
    """Raise SystemExit, so that the processes started so far are stopped."""
    raise SystemExit(1)


class Processes:
    """API processes and workers, each with its own supervisor."""

    def __init__(self, apis: Mapping[str, Sequence[str]], workers: Sequence[Sequence[str]]) -> None:
        """`apis` has the commands of API processes by their URLs, and `workers` the commands of workers."""
        self._commands = [(url, command, _API_GRACE_SECONDS) for url, command in apis.items()]
        self._commands += [("", command, GRACE_SECONDS) for command in workers]
        self._running = [Supervisor(1, command, grace) for _, command, grace in self._commands]

    def start(self) -> None:
        for supervisor in self._running:
            supervisor.start()

    def replace(self, stopped: threading.Event, say: Callable[[str], None]) -> str:
        """Restart the processes one after the other. Return "" if all restarted, else why some weren't restarted.

        After each API process there is a pause, in which load balancers notice that the process is ready again.
        """
        for index, (url, command, grace) in enumerate(self._commands):
            say(f"restarting {f'the API at {url}' if url else 'a worker'}")
            self._running[index].ask_to_stop()
            while self._running[index].is_running:
                time.sleep(_TICK_SECONDS)
            if stopped.is_set():
                return "smolora cluster up was stopped meanwhile"
            self._running[index] = Supervisor(1, command, grace)
            self._running[index].start()
            if url and not _comes_up(url, stopped, READY_SECONDS):
                return f"the API at {url} isn't ready again: nothing else was restarted"
            stopped.wait(_PAUSE_SECONDS if url else 0)
        return ""

    def stop(self) -> None:
        for supervisor in self._running:
            supervisor.ask_to_stop()
        while any(supervisor.is_running for supervisor in self._running):
            time.sleep(_TICK_SECONDS)


def restart(home: Path, say: Callable[[str], None]) -> None:
    """Make the running `smolora cluster up` restart its API processes and workers, and wait for them.

    Raise StartupError if it isn't running, or if a restart fails.
    """
    before = read_state(home)
    if not node.is_alive(before.pid, before.mark):
        raise StartupError("smolora cluster up has ended: start it again")
    os.kill(before.pid, _RESTART)
    while (state := read_state(home)).num_restarts == before.num_restarts:
        if not node.is_alive(before.pid, before.mark):
            raise StartupError("smolora cluster up ended meanwhile")
        time.sleep(_TICK_SECONDS)
    if state.fault:
        raise StartupError(state.fault)
    say(f"{len(state.urls)} API processes and {state.num_workers} workers were restarted")


def urls_of(settings: Settings, num_apis: int) -> tuple[str, ...]:
    """Return the API processes' URLs on this machine."""
    return tuple(url_of(settings.host, settings.port + index) for index in range(num_apis))


def api_command(settings: Settings, index: int, num_apis: int, address: str) -> list[str]:
    """Return the command of the API process `index`.

    Each process has its own port. If there are several, each has its own HOME, too.
    """
    home = settings.home.absolute()
    own = settings.model_copy(
        update={
            "home": home / f"api-{index}" if num_apis > 1 else home,
            "port": settings.port + index,
            "workers": 0,
        }
    )
    flags = [f"--address={address}", f"--parent={os.getpid()}"]
    return [sys.executable, "-P", "-m", "server.cli", "cluster", "api", *flags, *to_flags(own)]


def _check(settings: Settings, num_apis: int, address: str | None, ray_port: int) -> None:
    """Raise StartupError if the processes couldn't start.

    Several API processes or machines need a shared database and object store. API processes need free ports and,
    if other machines can connect, keys. The Ray cluster at `address` must be reachable.
    """
    if (num_apis > 1 or address is not None) and not (settings.database_url and settings.bytes_url):
        raise StartupError(
            "several API processes or machines need SMOLORA_DATABASE_URL and SMOLORA_BYTES_URL: what they share "
            "can't be files of one machine"
        )
    if num_apis:
        refuse_strangers(settings)
    if address is not None:
        node.refuse_unreachable(address)
    for index in range(num_apis):
        if address is None and settings.port + index == ray_port:
            raise StartupError(
                f"API process {index + 1} would have Ray's port, {ray_port}: choose another --ray-port"
            )
        _refuse_taken(settings.host, settings.port, index)


def _refuse_taken(host: str, port: int, index: int) -> None:
    """Raise StartupError if the API process `index` couldn't listen on its port.

    Without this check, the process would be restarted forever.
    """
    if port == 0:
        raise StartupError("port 0 (SMOLORA_PORT, --port): API processes need ports that are known")
    if port + index > _MAX_PORT:
        raise StartupError(
            f"API process {index + 1} would have port {port + index} (SMOLORA_PORT, --port): give a lower port"
        )
    bind(host, port + index).close()


def _comes_up(url: str, stopped: threading.Event, seconds: float) -> bool:
    """Wait until the API is ready, for `seconds` at most or until `stopped` is set. Return whether it is ready."""
    deadline = time.monotonic() + seconds
    while not stopped.wait(_TICK_SECONDS) and time.monotonic() < deadline:
        if is_ready(url):
            return True
    return False


def is_ready(url: str) -> bool:
    """Return whether the API process at `url` is ready."""
    try:
        with _DIRECT.open(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def queue_of(url: str) -> dict[str, int]:
    """Return the numbers of running and waiting sequences on all replicas.

    Return {} if the API process doesn't answer, or answers /metrics only to clients with a key.
    """
    try:
        with _DIRECT.open(f"{url}/metrics?all_replicas=true", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    found: dict[str, int] = {}
    for name in ("running", "waiting"):
        values = [line.rpartition(" ")[2] for line in lines if line.startswith(f"smolora_requests_{name}{{")]
        if values:
            found[name] = sum(int(float(value)) for value in values)
    return found
