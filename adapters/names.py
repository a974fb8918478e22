"""What adapters and aliases may be called."""

import re

BASE = "base"
"""Names the frozen model, never an adapter."""
MAX_NAME = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


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
