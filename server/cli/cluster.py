"""`smolora cluster`: engine replicas on Ray Serve, API processes and workers, on one machine or several."""

from typing import Annotated

import typer

from server.cli.options import with_flags
from server.cli.serve import serve_here
from server.config import Settings, forget_keys
from server.errors import StartupError

group = typer.Typer(
    help="Many machines: engine replicas on Ray Serve, API processes, workers.", no_args_is_help=True
)

AddressOption = Annotated[
    str, typer.Option(help="Of a Ray cluster, such as 10.0.0.1:6379. Default: this machine's.")
]


@group.command()
@with_flags(Settings)
def api(settings: Settings, address: AddressOption = "auto") -> None:
    """Serve the API from this process, with the cluster's replicas as its engine."""
    forget_keys()
    need_ray()
    from server.cluster.connect import connect_to

    raise typer.Exit(serve_here(settings, connect_to(address)))


def need_ray() -> None:
    """Raise StartupError where it isn't installed. Importing it is left to those who need it."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise StartupError("a cluster needs Ray: pip install 'smolora[cluster]'")
