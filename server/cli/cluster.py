"""`smolora cluster`: engine replicas on Ray Serve, API processes and workers, on one or several machines."""

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.common import Commands, say, with_flags
from server.cli.home import HomeOption, place_of
from server.cli.serve import serve_here
from server.config import Settings
from server.config.environment import forget_keys, set_up_ray
from server.errors import StartupError
from server.storage.home import make
from server.telemetry import logs

if TYPE_CHECKING:
    from server.cluster.deploy import Scale

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
AllReplicasOption = Annotated[
    int | None, typer.Option(min=1, help="Engine replicas. Default: 1, whatever runs at present.")
]
MaxReplicasOption = Annotated[int | None, typer.Option(min=1, help="Engine replicas under load.")]
ReplicaCpusOption = Annotated[float, typer.Option(min=0, help="Cores for each replica.")]
ReplicaGpusOption = Annotated[float, typer.Option(min=0, help="GPUs for each replica.")]
UpscaleOption = Annotated[float, typer.Option(min=0, help="Seconds of sustained load before scaling up.")]
DownscaleOption = Annotated[float, typer.Option(min=0, help="Seconds of low load before scaling down.")]
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
    replica_cpus: ReplicaCpusOption = 1,
    replica_gpus: ReplicaGpusOption = 0,
    api: Annotated[int, typer.Option(min=0, help="API processes, on ports from SMOLORA_PORT up.")] = 1,
    address: JoinOption = None,
    ray_port: Annotated[
        int, typer.Option(min=1, max=65535, help="The port of a new Ray cluster; Ray itself uses 10001 to 19999.")
    ] = 6379,
    cpus: Annotated[float | None, typer.Option(min=1, help="Cores to give to Ray. Default: all.")] = None,
) -> None:
    """Start Ray, engine replicas, API processes and workers, and supervise them until stopped.

    With --address, join the cluster of another machine.
    """
    _need_ray()
    from server.cluster.processes import up as run

    scale = None
    if address is None or replicas is not None:
        scale = _scale(replicas, max_replicas, replica_cpus, replica_gpus)
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
    replicas: AllReplicasOption = None,
    max_replicas: MaxReplicasOption = None,
    replica_cpus: ReplicaCpusOption = 1,
    replica_gpus: ReplicaGpusOption = 0,
    upscale_seconds: UpscaleOption = 5,
    downscale_seconds: DownscaleOption = 300,
    spare: SpareOption = None,
) -> None:
    """Update the engine replicas of a running cluster to this code, these settings and this number.

    No request fails. If only the number differs, running replicas stay.
    """
    _need_ray()
    from server.cluster.deploy import deploy as run
    from server.cluster.transport import join

    scale = _scale(replicas, max_replicas, replica_cpus, replica_gpus)
    join(address)
    scale = replace(scale, upscale_seconds=upscale_seconds, downscale_seconds=downscale_seconds, spare=spare)
    run(settings, scale, say)


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
    """Show replicas, API processes, workers, and the queue."""
    _need_ray()
    from server.cluster import node
    from server.cluster.node import read_state
    from server.cluster.processes import is_ready, queue_of
    from server.cluster.transport import join, replica_counts

    state = read_state(place_of(home))
    is_up = node.is_alive(state.pid, state.mark)
    typer.echo(f"smolora cluster up: {'runs' if is_up else 'has ended'} (process {state.pid})")
    for url in state.urls:
        typer.echo(f"API {url}: {'ready' if is_ready(url) else 'not ready'}")
    typer.echo(f"workers: {state.num_workers}")
    for what, number in (queue_of(state.urls[0]) if state.urls else {}).items():
        typer.echo(f"sequences {what}: {number}")
    join(state.address)
    counts = ", ".join(f"{number} {what}" for what, number in replica_counts().items()) or "none"
    typer.echo(f"replicas: {counts}")


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
    """Stop what `up` started on this machine. Requests finish; jobs keep a checkpoint and return to the queue."""
    from server.cluster import node
    from server.cluster.node import read_state, remove_state

    place = place_of(home)
    state = read_state(place)
    ended = node.end(state.pid, _DOWN_SECONDS, state.mark)
    ended = node.end(state.ray_pid, mark=state.ray_mark) and ended  # Ray still runs if `up` was killed
    if not ended:
        raise StartupError("some processes don't end: look at the processes of this user")
    remove_state(place)


_DOWN_SECONDS = 120.0


def _scale(replicas: int | None, most: int | None, cpus: float, gpus: float) -> "Scale":
    """Return the replicas' number and resources as a `Scale`. Raise StartupError if `most` is below `replicas`."""
    from server.cluster.deploy import Scale

    if most is not None and most < (replicas or 1):
        raise StartupError(f"--max-replicas {most} is less than --replicas {replicas or 1}")
    return Scale(replicas or 1, most, cpus, gpus)


def _need_ray() -> None:
    """Raise StartupError if Ray isn't installed, else set Ray's environment variables. Ray isn't imported."""
    if find_spec("ray") is None:
        raise StartupError("a cluster needs Ray: pip install -e '.[cluster]' in smolora's folder")
    set_up_ray()
