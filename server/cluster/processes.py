"""The API processes and workers of one machine, supervised; `smolora cluster up` from its settings to its end."""

import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable

from server.cluster import node
from server.cluster.deploy import Scale, deploy
from server.cluster.serve_transport import join, leave
from server.cluster.state import ClusterState, remove_state, write_state
from server.config import Settings
from server.errors import StartupError
from server.training.worker.supervisor import Supervisor, worker_command

_API_GRACE_SECONDS = 45.0  # more than a server takes to drain
_TICK_SECONDS = 0.2
_SECRETS = ("api_keys", "database_url")  # which processes inherit with the environment


def up(
    settings: Settings,
    scale: Scale | None,
    num_apis: int,
    address: str | None,
    ray_port: int,
    num_cpus: float | None,
    say: Callable[[str], None],
) -> int:
    """Start everything, and supervise it until told to stop; the exit code.

    With `address`, this machine joins that cluster; `scale` None leaves the replicas as they are.
    """
    home = settings.home.absolute()
    _check(settings, num_apis, address)
    log = home / "ray.log"
    say("starting Ray" if address is None else f"joining Ray at {address}")
    if address is None:
        ray, address = node.start_head(ray_port, log, num_cpus)
    else:
        ray = node.start_node(address, log, num_cpus)
    commands = [api_command(settings, index, num_apis, address) for index in range(num_apis)]
    apis = [Supervisor(1, command, _API_GRACE_SECONDS) for command in commands]
    workers = Supervisor(settings.workers, worker_command(settings.of_a_worker))
    stopped = threading.Event()
    urls = tuple(f"http://127.0.0.1:{settings.port + index}" for index in range(num_apis))
    write_state(home, ClusterState(address, os.getpid(), ray.pid, urls, settings.workers))
    try:
        if scale is not None:
            say(f"starting {scale.replicas} engine replicas")
            join(address)
            deploy(settings, scale)
            leave()
        for number in (signal.SIGTERM, signal.SIGINT):  # now: Ray sets its own while it is joined
            signal.signal(number, lambda *_: stopped.set())
        for supervisor in (*apis, workers):
            supervisor.start()
        _wait_until_ready(urls, stopped, say)
        while not stopped.wait(_TICK_SECONDS):
            if ray.poll() is not None:
                say("Ray has ended: so does this")
                return 1
        return 0
    finally:
        say("stopping: requests end, jobs go back to the queue")
        for supervisor in (*apis, workers):
            supervisor.ask_to_stop()
        while any(supervisor.is_running for supervisor in (*apis, workers)):
            time.sleep(_TICK_SECONDS)
        ray.terminate()
        ray.wait(node.STOP_SECONDS)
        remove_state(home)


def api_command(settings: Settings, index: int, num_apis: int, address: str) -> list[str]:
    """What runs one API process; where there are several, each has a HOME and a port of its own."""
    home = settings.home.absolute()
    own = settings.model_copy(
        update={
            "home": home / f"api-{index}" if num_apis > 1 else home,
            "port": settings.port + index,
            "workers": 0,
        }
    )
    flags = [f"--address={address}", f"--parent={os.getpid()}"]
    return [sys.executable, "-P", "-m", "server.cli", "cluster", "api", *flags, *_flags(own)]


def _flags(settings: Settings) -> list[str]:
    """Those of the settings that aren't as they are by themselves, and no secrets."""
    found = []
    for name, field in Settings.model_fields.items():
        value, flag = getattr(settings, name), name.replace("_", "-")
        if name in _SECRETS or value is None or value == field.default:
            continue
        if isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{flag}")
        else:
            found.append(f"--{flag}={','.join(value) if isinstance(value, tuple) else value}")
    return found


def _check(settings: Settings, num_apis: int, address: str | None) -> None:
    """Raise StartupError where processes would not see each other's things."""
    shared = [getattr(settings, name, None) for name in ("database_url", "bytes_url")]
    if (num_apis > 1 or address is not None) and not all(shared):
        raise StartupError(
            "several API processes or machines need SMOLORA_DATABASE_URL and SMOLORA_BYTES_URL: what they share "
            "can't be files of one machine"
        )


def _wait_until_ready(urls: tuple[str, ...], stopped: threading.Event, say: Callable[[str], None]) -> None:
    waiting = list(urls)
    while waiting and not stopped.wait(_TICK_SECONDS):
        if is_ready(waiting[0]):
            say(f"the API is ready at {waiting.pop(0)}")


def is_ready(url: str) -> bool:
    """Whether the API there can serve."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:  # noqa: S310 it is ours
            return bool(answer.status == 200)
    except OSError:
        return False


def queue_of(url: str) -> dict[str, int]:
    """How many sequences run and wait on all replicas, as the API there tells whoever has no key, if it does."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:  # noqa: S310 it is ours
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    pairs = (line.rpartition(" ") for line in lines if line.startswith("smolora_requests_"))
    told = {name.removeprefix("smolora_requests_"): value for name, _, value in pairs}
    return {name: int(float(told[name])) for name in ("running", "waiting") if name in told}
