"""Whose names are meant: every adapter belongs to a project, and every look at the catalog is a project's.

A project's own names stand alone, "tweets"; another's come with it, "acme/tweets", and are there only where that
project made them public. Tables and records know an adapter by its *key*: "tweets" in the project `default`,
"acme/tweets" in any other, so that what was stored before there were projects is the default one's as it is.
"""

from dataclasses import dataclass

from adapters.names import NAME_RULE, is_name

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
