"""Strict JSON for untrusted input: in UTF-8, of bounded depth, without NaN, infinities or repeated keys."""

import json
import math
from collections import Counter
from typing import NoReturn


class BadJsonError(ValueError):
    """Text that isn't strict JSON. The message is safe to show after a subject, such as a file's name."""


def parse(text: str) -> object:
    """Return the JSON value in `text`. Raise BadJsonError if `text` isn't strict JSON."""
    if text.startswith("\ufeff"):
        raise BadJsonError("is not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) at character 1")
    try:
        value: object = _DECODER.decode(text)
    except BadJsonError:
        raise
    except RecursionError:
        raise BadJsonError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        reason = error.msg.removesuffix(" at")
        raise BadJsonError(f"is not JSON: {reason} at {line}character {error.colno}") from None
    except ValueError:  # an integer of thousands of digits
        raise BadJsonError("holds a number that is too long") from None
    return value


def parse_object(data: bytes) -> dict[str, object]:
    """Return the JSON object in `data`. Raise BadJsonError if `data` isn't strict JSON, or no object."""
    try:
        value = parse(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadJsonError("is not UTF-8 text") from None
    if not isinstance(value, dict):
        raise BadJsonError("must be a JSON object")
    return value


def printable(text: str, limit: int = 200) -> str:
    """Make `text` safe for terminals and logs: escape unprintable characters, and cut it at `limit` characters."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}…"


def _refuse_constant(name: str) -> NoReturn:
    raise BadJsonError(f"is not JSON: {name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadJsonError("holds a number that is too large")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise BadJsonError(f"has the key '{printable(twice)}' twice")
    return members


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique, parse_float=_finite)
"""The decoder for all texts: `json.loads` would create one per text, which takes as long as parsing a short text.
"""
