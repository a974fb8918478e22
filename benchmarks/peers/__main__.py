"""Sets a peer up: `python -m benchmarks.peers make NAME`."""

import argparse
from pathlib import Path

from benchmarks.command import speaker
from benchmarks.peers.venvs import MAKERS, make


def main(arguments: list[str] | None = None) -> None:
    """Make those that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Sets a peer up.")
    parser.add_argument("action", choices=["make"])
    parser.add_argument("names", nargs="+", choices=list(MAKERS), metavar="NAME", help=f"of {', '.join(MAKERS)}")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where: in its folder `peers`")
    options = parser.parse_args(arguments)
    say = speaker()
    for name in options.names:
        make(options.cache, name, say)


if __name__ == "__main__":
    main()
