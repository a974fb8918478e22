"""Names of adapters, aliases and projects: which are valid, which project a name belongs to, and similar names.

Every adapter belongs to a project. A project calls its own adapters by plain names ("tweets"). It calls another
project's public adapters by that project's name and theirs ("acme/tweets"). Tables and records use an adapter's
*key*: "tweets" for an adapter of the project `default`, "acme/tweets" for one of the project `acme`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from heapq import nlargest
from string import ascii_lowercase, digits

BASE = "base"
"""The name of the frozen model, which no adapter may have."""
MAX_NAME = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
NAME_RULE = f'must be 1 to {MAX_NAME} letters, digits, "_", "-" or ".", the first a letter or digit'
MAX_KEY = 2 * MAX_NAME + 1
"""The maximum length of a key: a project's name, a slash and an adapter's name."""

_CUTOFF = 0.7
"""The least ratio of difflib that counts as similar: it allows one typo in a word of five letters or more."""

_MAX_COMPARED = 4
"""The number of names that difflib compares, at some 40 µs each."""


def near(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `name`, or None if no name is similar.

    A name that differs only in case is preferred.

    Only the few names that begin and end most like `name` are compared, since a typo doesn't change the characters
    before and after it. A `name` of more than twice the maximum length is similar to none, which bounds the time.
    """
    if len(name) > 2 * MAX_NAME:
        return None
    compared = nlargest(
        _MAX_COMPARED, known, key=lambda other: (other.lower() == name.lower(), _agreement(name, other))
    )
    if compared and compared[0].lower() == name.lower():
        return compared[0]
    return next(iter(get_close_matches(name, compared, 1, _CUTOFF)), None)


def slips(name: str) -> set[str]:
    """Return the names that somebody who typed `name` may have meant. Each name undoes one common typo."""
    pairs = [(name[:i], name[i:]) for i in range(len(name))]
    doubled = {before + after[1:] for before, after in pairs}
    swapped = {before + after[1] + after[0] + after[2:] for before, after in pairs if len(after) > 1}
    first = {letter + rest for letter in ascii_lowercase + digits for rest in (name, name[1:])}
    return (doubled | swapped | first | {name.lower(), name.replace("_", "-"), name.replace("-", "_")}) - {
        "",
        name,
    }


def _agreement(name: str, other: str) -> float:
    """Return the length of the names' common prefix and suffix, as a share of the longer name's length."""
    before = _num_alike(name, other)
    after = _num_alike(name[before:][::-1], other[before:][::-1])
    return (before + after) / max(len(name), len(other), 1)


def _num_alike(name: str, other: str) -> int:
    """Return the length of the names' common prefix."""
    pairs = enumerate(zip(name, other, strict=False))
    return next((at for at, (mine, its) in pairs if mine != its), min(len(name), len(other)))


def name_fault(name: str) -> str | None:
    """Return why `name` is invalid as an adapter's name, or None if it is valid."""
    if name == BASE:
        return "is the base's own name: choose another"
    return None if is_name(name) else NAME_RULE


def reference_fault(name: str) -> str | None:
    """Return why `name` is invalid as a reference ("name" or "project/name"), or None if it is valid."""
    project, slash, own = name.rpartition("/")
    return NAME_RULE if slash and not is_name(project) else name_fault(own)


def is_name(name: str) -> bool:
    """Return whether `name` follows NAME_RULE."""
    return len(name) <= MAX_NAME and NAME.fullmatch(name) is not None


def alias_fault(alias: str) -> str | None:
    """Return why `alias` is invalid, or None if it is valid."""
    if alias.isdigit():
        return "is a number, which names a version: an alias has a letter"
    return name_fault(alias)


DEFAULT_PROJECT = "default"


def key_of(project: str, name: str) -> str:
    """Return the key that identifies the project's adapter `name` in tables and records."""
    return name if project == DEFAULT_PROJECT else f"{project}/{name}"


def split_key(key: str) -> tuple[str, str]:
    """Return (project, name) of a key, as the inverse of `key_of`."""
    project, _, name = key.rpartition("/")
    return project or DEFAULT_PROJECT, name


def project_fault(project: str) -> str | None:
    """Return why `project` is invalid as a project's name, or None if it is valid."""
    return None if is_name(project) else NAME_RULE


@dataclass(frozen=True)
class Viewpoint:
    """The project for which the catalog of adapters is read or written.

    If `sees_all` is true, other projects' private adapters are visible, too. `key_id` identifies the API key, if
    any: it is recorded with each published version.
    """

    project: str = DEFAULT_PROJECT
    sees_all: bool = False
    key_id: str | None = None

    def key(self, name: str) -> str:
        """Return the key of the adapter that this project calls `name`, such as "tweets" or "acme/tweets"."""
        project, slash, own = name.rpartition("/")
        return key_of(project, own) if slash else key_of(self.project, name)

    def shown(self, key: str) -> str:
        """Return what this project calls the adapter with this key. This is the inverse of `key`."""
        project, name = split_key(key)
        return name if project == self.project else f"{project}/{name}"

    def owns(self, key: str) -> bool:
        """Return whether the adapter with this key belongs to the project."""
        return split_key(key)[0] == self.project
