"""`python -m benchmarks.guard`: make a quick run and compare its ratios with the recorded ones (`--record`).

Exits with code 1 if a ratio fell too far.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import serve
from benchmarks.guard.ratios import RECORDED, compare, markdown, record

_QUICK = ("--quick", "--only", "loads", "--peers", "peft,torch")
"""Flags of a quick run of a minute or two, with peers that need no compiling."""


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code. Unknown flags are passed on to the serving benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("--record", action="store_true", help="replace the recorded ratios by this run's")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="file of recorded ratios")
    options, others = parser.parse_known_args(arguments)
    results = serve.main([*_QUICK, *others])
    if options.record:
        record(results, options.recorded)
    compared = compare(results, options.recorded)
    print(f"\n{markdown(compared, results)}")
    return 0 if compared is None or all(each.holds for each in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
