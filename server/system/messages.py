"""Helpers for messages to users: the command that runs this program, nouns with a number, and errors."""

import shlex
import shutil
import sys
from pathlib import Path

NAME = "smolora"


def program() -> str:
    """Return the command that runs this program in the current folder, so that suggested commands can be pasted.

    This is `smolora` if the shell finds this installation by that name, else the program's path. The path is
    relative if it is below the current folder. But in `/` it is absolute: services run there, users' shells don't.
    """
    called = Path(sys.argv[0])
    if called.name != NAME:  # `python -m server.cli`, or a test
        called = Path(sys.executable).with_name(NAME)
    if not called.exists():
        return shlex.join([sys.executable, "-m", "server.cli"])
    found = shutil.which(NAME)
    if found is not None and called.samefile(found):
        return NAME
    here = Path.cwd()
    if called.is_absolute() and called.is_relative_to(here) and here != Path(here.anchor):
        called = called.relative_to(here)
    return shlex.quote(f"./{called}" if len(called.parts) == 1 else str(called))


def plural(number: int, noun: str) -> str:
    """Return `1 version`, `2 versions` or `1,000 rows`. The noun's plural must just add an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return the error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
