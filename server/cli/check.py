"""`smolora check`: compare the code that would serve on this machine with torch."""

from functools import partial
from typing import TYPE_CHECKING

import typer

from adapters.errors import SmoloraError
from server.cli.common import fail, say, show, table_of
from server.config import Settings
from server.storage.home import make
from server.system.memory import exempt_from_gc

if TYPE_CHECKING:
    from server.engine.self_check import SelfCheck


def check_here(settings: Settings) -> int:
    """Print the comparisons as a table, and return the exit code: 0 if all are within their margins.

    It is also 1 if a GPU's kernels don't serve, or a fallback is active.
    """
    with exempt_from_gc():
        from server.model.load import load_on_device
        from server.serve.engine import base_directory, gpu_share, self_check

    make(settings.home)
    base = load_on_device(settings, base_directory(settings, say), say, partial(gpu_share, settings))
    try:
        backend, found = self_check(settings, base, say)
    except SmoloraError as error:
        fail(f"the backend failed: {error}")
    _print(found)
    same = "the same" if found.is_batch_invariant else "different"
    typer.echo(f"{backend.name} gives {same} bits alone and in a batch.")
    for reason in backend.fallbacks:
        say(reason)
    return 1 if found.beyond or backend.fallbacks else 0


def _print(found: "SelfCheck") -> None:
    table = table_of("prompt", "values", "largest difference", "margin", "")
    for one in found.comparisons:
        result = "" if one.is_within else "too large"
        table.add_row(one.name, str(one.num), f"{one.difference:.3g} {one.unit}", f"{one.margin:g}", result)
    show(table)
