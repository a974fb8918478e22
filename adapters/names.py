"""What adapters and aliases may be called.

Whose names are meant: every adapter belongs to a project, and every look at the catalog is a project's.

A project's own names stand alone, "tweets"; another's come with it, "acme/tweets", and are there only where that
project made them public. Tables and records know an adapter by its *key*: "tweets" in the project `default`,
"acme/tweets" in any other, so that what was stored before there were projects is the default one's as it is.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from heapq import nlargest
from string import ascii_lowercase, digits

BASE = "base"
"""Names the frozen model, never an adapter."""
MAX_NAME = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
NAME_RULE = f'must be 1 to {MAX_NAME} letters, digits, "_", "-" or ".", the first a letter or digit'
MAX_KEY = 2 * MAX_NAME + 1
"""Of a project's name and an adapter's, with a slash between."""


_CUTOFF = 0.7
"""Of difflib's ratio: a letter left out, doubled or swapped in a word of five or more."""


_COMPARED = 4
"""Names that difflib compares, which takes it some 40 µs each."""


def near(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, if any is: one in other letters' cases before all others.

    Only those are compared that agree with it longest from either end: a slip leaves what is before and after it.
    Nothing is like what is twice as long as any name: difflib would look at each of its characters.
    """
    if len(name) > 2 * MAX_NAME:
        return None
    compared = nlargest(
        _COMPARED, known, key=lambda other: (other.lower() == name.lower(), _agreement(name, other))
    )
    if compared and compared[0].lower() == name.lower():
        return compared[0]
    return next(iter(get_close_matches(name, compared, 1, _CUTOFF)), None)


def slips(name: str) -> set[str]:
    """What `name` was meant to be if it has one slip that can be undone without knowing the names."""
    pairs = [(name[:i], name[i:]) for i in range(len(name))]
    doubled = {before + after[1:] for before, after in pairs}
    swapped = {before + after[1] + after[0] + after[2:] for before, after in pairs if len(after) > 1}
    first = {letter + rest for letter in ascii_lowercase + digits for rest in (name, name[1:])}
    return (doubled | swapped | first | {name.lower(), name.replace("_", "-"), name.replace("-", "_")}) - {
        "",
        name,
    }


def _agreement(name: str, other: str) -> float:
    """The share of characters that agree, counted from both ends."""
    before = _num_alike(name, other)
    after = _num_alike(name[before:][::-1], other[before:][::-1])
    return (before + after) / max(len(name), len(other), 1)


def _num_alike(name: str, other: str) -> int:
    """How many characters agree before the first that doesn't."""
    pairs = enumerate(zip(name, other, strict=False))
    return next((at for at, (mine, its) in pairs if mine != its), min(len(name), len(other)))


def name_fault(name: str) -> str | None:
    """Why no adapter may be called so, if none may. "base" is the frozen model's name and never an adapter's."""
    if name == BASE:
        return "is the base's own name: choose another"
    return None if is_name(name) else NAME_RULE


def reference_fault(name: str) -> str | None:
    """Why no adapter may be referred to so, if none may: by its name, or by `project/name`."""
    project, slash, own = name.rpartition("/")
    return NAME_RULE if slash and not is_name(project) else name_fault(own)


def is_name(name: str) -> bool:
    """Whether it follows the rule for names."""
    return len(name) <= MAX_NAME and NAME.fullmatch(name) is not None


def alias_fault(alias: str) -> str | None:
    """Why no alias may be called so, if none may."""
    if alias.isdigit():
        return "is a number, which names a version: an alias has a letter"
    return name_fault(alias)


DEFAULT_PROJECT = "default"


def key_of(project: str, name: str) -> str:
    """What tables and records call the project's `name`."""
    return name if project == DEFAULT_PROJECT else f"{project}/{name}"


def split_key(key: str) -> tuple[str, str]:
    """(project, name): the inverse of `key_of`."""
    project, _, name = key.rpartition("/")
    return project or DEFAULT_PROJECT, name


def project_fault(project: str) -> str | None:
    """Why no project may be called so, if none may."""
    return None if is_name(project) else NAME_RULE


@dataclass(frozen=True)
class Viewpoint:
    """A project that looks. `sees_all`: others' private things, too. `key_id` is kept with what it makes."""

    project: str = DEFAULT_PROJECT
    sees_all: bool = False
    key_id: str | None = None

    def key(self, name: str) -> str:
        """The key of what is called `name` from here: "tweets" is its own, "acme/tweets" that project's."""
        project, slash, own = name.rpartition("/")
        return key_of(project, own) if slash else key_of(self.project, name)

    def shown(self, key: str) -> str:
        """The inverse of `key`."""
        project, name = split_key(key)
        return name if project == self.project else f"{project}/{name}"

    def owns(self, key: str) -> bool:
        """Whether it is one of the project's own."""
        return split_key(key)[0] == self.project
