"""Keys and passwords of the command line and the environment: where nobody else sees them."""

import os
import sys

from server.config import PREFIX

_KEY_FLAGS = {"--api-keys": f"{PREFIX}API_KEYS", "--api-key": f"{PREFIX}API_KEY"}  # a server's, and a client's
_SECRET_FLAGS = {**_KEY_FLAGS, "--database-url": f"{PREFIX}DATABASE_URL"}
_SERVERS = ("serve", "cluster", "worker")
"""Commands without --api-key, which others have: they are to say so, and not to run without what it was for."""


def hide_keys() -> None:
    """Start this program anew, where it was given secrets as flags, with them in its environment instead.

    A command line is shown to every user of the machine, by `ps`; an environment to the process's own user alone.
    """
    kept, moved = [sys.executable], dict[str, str]()
    command = ""
    for command in sys.argv[1:]:
        if not command.startswith("-"):
            break
        if command.partition("=")[0] in _SECRET_FLAGS:
            return  # no command has them before its name, and what comes next is no command
    flags = _SECRET_FLAGS.keys() - ({"--api-key"} if command in _SERVERS else {"--api-keys"})
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        flag, has_value, value = argument.partition("=")
        given = value if has_value else None
        if argument == "--":
            kept += [argument, *arguments]
        elif flag in flags and (given is not None or (given := next(arguments, None)) is not None):
            moved[_SECRET_FLAGS[flag]] = given
        else:
            kept.append(argument)
    if moved:
        os.execve(sys.executable, kept, {**os.environ, **moved})  # noqa: S606 it is this program


def forget_keys() -> bool:
    """Take keys out of the environment, once the settings have been read: no child process gets them. Whether one
    that commands send was among them."""
    found = {name: os.environ.pop(name, "") for name in _KEY_FLAGS.values()}
    return bool(found[_KEY_FLAGS["--api-key"]])
