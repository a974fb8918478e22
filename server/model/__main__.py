"""`python -m server.model --home DIR` converts a base in advance, for an image that contains it."""

import argparse
import sys
from pathlib import Path

from server.errors import StartupError
from server.model.base.source import EMBEDDED, resolve_base


def main() -> int:
    """Convert the base, unless it is converted already, and print the path of its directory to standard output.

    Progress goes to standard error. Return the exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m server.model", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="the base is written to its folder models")
    parser.add_argument("--model", default=EMBEDDED, help="as SMOLORA_MODEL (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        found = resolve_base(arguments.model, arguments.home, progress=_progress)
    except StartupError as error:
        _progress(f"smolora: {error}")
        return 1
    sys.stdout.write(f"{found}\n")
    return 0


def _progress(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
