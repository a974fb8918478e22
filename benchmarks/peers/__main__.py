"""Install peers: `python -m benchmarks.peers make NAME`."""

import argparse
from pathlib import Path

from benchmarks.command import speaker
from benchmarks.peers.venvs import MAKERS, make


def main(arguments: list[str] | None = None) -> None:
    """Install the named peers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Install peers.")
    parser.add_argument("action", choices=["make"])
    parser.add_argument(
        "names", nargs="+", choices=list(MAKERS), metavar="NAME", help=f"peers to install: {', '.join(MAKERS)}"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache"), help="peers are installed in its folder `peers`"
    )
    options = parser.parse_args(arguments)
    say = speaker()
    for name in options.names:
        make(options.cache, name, say)


if __name__ == "__main__":
    main()
