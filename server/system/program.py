"""How this program was called, so that the commands it suggests run as they are pasted.

Counts in sentences.
"""

import shlex
import shutil
import sys
from pathlib import Path

NAME = "smolora"


def program() -> str:
    """`smolora` where the shell finds this very one by its name, else its path, a relative one where it may be.

    Nobody's shell is at `/`, where services are: what is below it keeps its whole path.
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


def counted(number: int, noun: str) -> str:
    """As in `1 version`, `2 versions`, `1,000 rows`: for nouns whose plural ends in an s alone."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
