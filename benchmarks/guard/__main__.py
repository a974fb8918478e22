"""`python -m benchmarks.guard`: a quick run, and whether its ratios are still what was recorded (`--record`).

Ends with exit code 1 where one is not.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import serve
from benchmarks.guard.ratios import RECORDED, compare, markdown, record

_QUICK = ("--quick", "--only", "loads", "--peers", "peft,torch")
"""What a quick run measures in a minute or two, with peers that nobody has to compile."""


def main(arguments: list[str] | None = None) -> int:
    """The exit code. Flags that aren't known are the serving benchmark's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__)
    parser.add_argument("--record", action="store_true", help="keep this run's ratios instead of the last ones")
    parser.add_argument("--recorded", type=Path, default=RECORDED, help="where they are kept")
    options, others = parser.parse_known_args(arguments)
    results = serve.main([*_QUICK, *others])
    if options.record:
        record(results, options.recorded)
    compared = compare(results, options.recorded)
    print(f"\n{markdown(compared, results)}")
    return 0 if compared is None or all(each.holds for each in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
