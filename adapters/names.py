"""What adapters and aliases may be called."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

BASE = "base"
"""Names the frozen model, never an adapter."""
MAX_NAME = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


_CUTOFF = 0.7
"""Of difflib's ratio: a letter left out, doubled or swapped in a word of five or more."""


def near(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, if any is."""
    return next(iter(get_close_matches(name, list(known), 1, _CUTOFF)), None)


def name_fault(name: str) -> str | None:
    """Why no adapter may be called so, if none may. "base" is the frozen model's name and never an adapter's."""
    if name == BASE:
        return "is the base's own name"
    if len(name) > MAX_NAME or NAME.fullmatch(name) is None:
        return f'has 1 to {MAX_NAME} letters, digits, "_", "-" or ".", a letter or digit first'
    return None


def alias_fault(alias: str) -> str | None:
    """Why no alias may be called so, if none may."""
    if alias.isdigit():
        return "is a number, which names a version: an alias has a letter"
    return name_fault(alias)
