"""`smolora cluster`: engine replicas on Ray Serve, API processes and workers, on one or several machines."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common import Commands, say, with_flags
from server.cli.home import HomeOption, place_of
from server.cli.serve import serve_here
from server.config import Settings, WorkerSettings, load
from server.config.environment import forget_keys, set_up_ray
from server.errors import StartupError
from server.storage.home import make
from server.telemetry import logs

if TYPE_CHECKING:
    from server.jobs.presence import PresentWorker

group = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Engine replicas on Ray Serve, API processes and workers."
)

AddressOption = Annotated[
    str, typer.Option(help="A Ray cluster's address, such as 10.0.0.1:6379. Default: this machine's.")
]
JoinOption = Annotated[
    str | None, typer.Option(help="The Ray cluster to join. Default: start a new one on this machine.")
]
ReplicasOption = Annotated[int | None, typer.Option(min=1, help="Engine replicas. Default: 1, or as before.")]
MaxReplicasOption = Annotated[
    int | None, typer.Option(min=1, help="Engine replicas under load. As many as --replicas: no autoscaling.")
]
ReplicaCpusOption = Annotated[float | None, typer.Option(min=0, help="Cores for each replica. Default: 1.")]
ReplicaGpusOption = Annotated[float | None, typer.Option(min=0, help="GPUs for each replica. Default: 0.")]
UpscaleOption = Annotated[
    float | None, typer.Option(min=0, help="Seconds of sustained load before scaling up. Default: 5.")
]
DownscaleOption = Annotated[
    float | None, typer.Option(min=0, help="Seconds of low load before scaling down. Default: 300.")
]
SpareOption = Annotated[
    bool | None,
    typer.Option(help="Start a new replica before the old one ends, or after. Default: before, if there is room."),
]


@group.command()
@with_flags(Settings)
def up(
    settings: Settings,
    replicas: ReplicasOption = None,
    max_replicas: MaxReplicasOption = None,
    replica_cpus: ReplicaCpusOption = None,
    replica_gpus: ReplicaGpusOption = None,
    api: Annotated[int, typer.Option(min=0, help="API processes, on ports from SMOLORA_PORT up.")] = 1,
    address: JoinOption = None,
    ray_port: Annotated[
        int, typer.Option(min=1, max=65535, help="The port of a new Ray cluster; Ray itself uses 10001 to 19999.")
    ] = 6379,
    cpus: Annotated[float | None, typer.Option(min=0, help="Cores to give to Ray. Default: all.")] = None,
) -> None:
    """Start Ray, engine replicas, API processes and workers, and supervise them until stopped.

    With --address, join the cluster of another machine.
    """
    _need_ray()
    from server.cluster.processes import up as run

    scale: dict[str, float] | None = None
    if address is None or replicas is not None:
        scale = _scale(replicas=replicas or 1, most=max_replicas, num_cpus=replica_cpus, num_gpus=replica_gpus)
    elif max_replicas is not None:
        raise StartupError("with --address, --max-replicas needs --replicas: without it no replica is changed")
    make(settings.home)
    logs.set_up(settings.log_format)
    raise typer.Exit(run(settings, scale, api, address, ray_port, cpus, say))


@group.command()
@with_flags(Settings)
def deploy(
    settings: Settings,
    address: AddressOption = "auto",
    replicas: ReplicasOption = None,
    max_replicas: MaxReplicasOption = None,
    replica_cpus: ReplicaCpusOption = None,
    replica_gpus: ReplicaGpusOption = None,
    upscale_seconds: UpscaleOption = None,
    downscale_seconds: DownscaleOption = None,
    spare: SpareOption = None,
    forget: Annotated[
        bool,
        typer.Option("--forget", help="Take what isn't given from the defaults, not the last deployment."),
    ] = False,
) -> None:
    """Update the engine replicas of a running cluster to this code, and to the flags and variables given.

    Everything else stays as in the last deployment. No request fails. If only the number of replicas differs,
    running replicas stay.
    """
    _need_ray()
    from server.cluster.deploy import redeploy

    given = _scale(
        replicas=replicas,
        most=max_replicas,
        num_cpus=replica_cpus,
        num_gpus=replica_gpus,
        upscale_seconds=upscale_seconds,
        downscale_seconds=downscale_seconds,
        spare=spare,
    )
    redeploy(settings, address, given, forget=forget, say=say)


@group.command()
@with_flags(Settings)
def api(
    settings: Settings,
    address: AddressOption = "auto",
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve the API from this process, with the cluster's replicas as its engine."""
    has_clients_key = forget_keys()
    _need_ray()
    from server.cluster.transport import connect_to
    from server.jobs.pipe import end_with_parent

    if parent is not None:
        end_with_parent(parent)
    raise typer.Exit(serve_here(settings, connect_to(address), has_clients_key=has_clients_key))


@group.command()
def status(home: HomeOption = None) -> None:
    """Show this machine's API processes, all machines' workers and replicas, the queue, and where logs are."""
    _need_ray()
    from server.cluster import node
    from server.cluster.finder import join, machines, replica_counts
    from server.cluster.node import read_state
    from server.cluster.processes import is_ready, queue_of

    settings = load(WorkerSettings, home=home)
    state = read_state(settings.home)
    is_up = node.is_alive(state.pid, state.mark)
    typer.echo(f"smolora cluster up: {'runs' if is_up else 'has ended'} (process {state.pid})")
    typer.echo("logs of up, API processes and workers: standard error of up; with systemd: journalctl")
    typer.echo(f"log of Ray: {settings.home / node.LOG_NAME}")
    for url in state.urls:
        typer.echo(f"API {url}: {'ready' if is_ready(url) else 'not ready'}")
    try:
        lines = [worker.line() for worker in _workers(settings)]
        typer.echo("\n".join(lines or ["workers: none"]))
    except StartupError as error:
        typer.echo(f"workers: {state.num_workers} were started here; which live, is unknown: {error}")
    for what, number in (queue_of(state.urls[0]) if state.urls else {}).items():
        typer.echo(f"sequences {what}: {number}")
    join(state.address)
    for machine in machines():
        typer.echo(machine.line())
        for replica in machine.replicas:
            typer.echo(f"  {replica.line()}")
    counts = ", ".join(f"{number} {what}" for what, number in replica_counts().items()) or "none"
    typer.echo(f"replicas: {counts}")


def _workers(settings: WorkerSettings) -> "list[PresentWorker]":
    """Return the workers of all machines. Raise StartupError if the database can't be opened or read."""
    from server.database import as_startup_error, connect, existing, refuse_unused
    from server.jobs.presence import present_workers

    if settings.database is None:
        existing(settings.home)
    else:
        refuse_unused(settings.database)  # before `connect` makes tables there
    with as_startup_error(settings.home):
        engine = connect(settings.home, url=settings.database)
        try:
            return present_workers(engine, settings.home)
        finally:
            engine.dispose()


@group.command()
def restart(home: HomeOption = None) -> None:
    """Restart the API processes and workers of this machine one after the other, for example for new code.

    `deploy` does that for replicas.
    """
    _need_ray()
    from server.cluster.processes import restart as run

    run(place_of(home), say)


@group.command()
def down(home: HomeOption = None) -> None:
    """Stop what `up` started on this machine. Requests finish; jobs keep a checkpoint and return to the queue.

    On the machine where the cluster began, this stops the engine replicas of all machines within a minute. The
    other machines' API processes answer 503, and go on when `up` runs here again.
    """
    from server.cluster import node
    from server.cluster.node import read_state, remove_state

    place = place_of(home)
    state = read_state(place)
    if state.is_head:
        say("the cluster began here: all machines' engine replicas stop until `up` runs here again")
    ended = node.end(state.pid, _DOWN_SECONDS, state.mark)
    ended = node.end(state.ray_pid, mark=state.ray_mark) and ended  # Ray still runs if `up` was killed
    if not ended:
        raise StartupError("some processes don't end: look at the processes of this user")
    remove_state(place)


_DOWN_SECONDS = 120.0


def _scale(**given: float | None) -> dict[str, float]:
    """Return the fields of `Scale` that are given. Raise StartupError if they contradict each other."""
    found = {name: value for name, value in given.items() if value is not None}
    if {"most", "replicas"} <= found.keys() and found["most"] < found["replicas"]:
        raise StartupError(f"--max-replicas {found['most']} is less than --replicas {found['replicas']}")
    return found


def _need_ray() -> None:
    """Raise StartupError if Ray isn't installed, else set Ray's environment variables. Ray isn't imported."""
    if find_spec("ray") is None:
        raise StartupError("a cluster needs Ray: .venv/bin/pip install -e '.[cluster]' in smolora's folder")
    set_up_ray()
