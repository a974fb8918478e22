"""Who wants to know which replicas there are, in this process.

A module of its own: Serve makes a copy of the router's class, and with it of what the router's module has, but not
of the modules that it imports.
"""

from collections.abc import Callable

Told = Callable[[frozenset[str]], None]

_watchers: list[Told] = []


def watch(told: Told) -> None:
    """Have `told` called with the ids of the replicas whenever they change."""
    _watchers.append(told)


def tell(ids: frozenset[str]) -> None:
    """These are the replicas from now on."""
    for told in _watchers:
        told(ids)
