"""`make attack`: a million inputs for all code that reads untrusted bytes. ARGS: how many, for how long, which
targets; or

replay FILE: run one input again, such as a finding, after the inputs before it; print its outcome or traceback
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.stress.fuzzing.bounds import Meter
from tests.stress.fuzzing.findings import CACHE, before_of
from tests.stress.fuzzing.guided import MissingError, Result, run, targets
from tests.stress.fuzzing.target import SHARES, load

NUM_INPUTS = 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="make attack", description="Inputs for whatever takes strangers' bytes.")
    parser.add_argument("what", nargs="*", metavar="TARGET", help=f"of {', '.join(SHARES)}; or: replay FILE")
    parser.add_argument("--inputs", type=int, help=f"of all targets together (default: {NUM_INPUTS:,})")
    parser.add_argument("--seconds", type=float, help="instead: of all targets together")
    given = parser.parse_args()
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # as in the server
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads of its own: the process forks
    if Path("/dev/shm").is_dir():  # many short-lived files are written there
        tempfile.tempdir = "/dev/shm"
    if given.what[:1] == ["replay"]:
        for file in given.what[1:]:
            replay(Path(file))
        return 0
    if unknown := set(given.what) - set(SHARES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    return attack(given.what or list(SHARES), given.inputs, given.seconds)


def replay(file: Path) -> None:
    """Run one input. The file's name or its folder's begins with the target's name."""
    names = (file.name.partition("-")[0], *(folder.name for folder in file.absolute().parents))
    name = next(name for name in names if name in SHARES)
    target = load(name)
    for before in sorted(before_of(file).glob("*")):
        with suppress(Exception):
            target.run(before.read_bytes())
    outcome, cost = Meter(target).run(file.read_bytes())
    sys.stdout.write(f"{name}: {outcome}, {cost.cpu_seconds:.3f} s of a processor, {cost.memory >> 10} KiB\n")


def attack(names: list[str], num_inputs: int | None, seconds: float | None) -> int:
    """Run all targets one after the other. Return 1 if there is a finding."""
    begun = time.monotonic()
    try:
        loaded = targets(names)
    except MissingError as error:
        sys.stderr.write(f"make attack: {error}\n")
        return 2
    all_shares = sum(SHARES[name] for name in names)
    results: list[Result] = []
    for name, target in loaded.items():
        number = None if seconds is not None else round((num_inputs or NUM_INPUTS) * SHARES[name] / all_shares)
        results.append(run(name, target, number, None if seconds is None else seconds / len(names)))
        sys.stdout.write(f"{_line(results[-1])}\n")
        sys.stdout.flush()
    total = sum(result.tally.inputs for result in results)
    findings = [finding for result in results for finding in result.tally.findings.values()]
    took = time.monotonic() - begun
    sys.stdout.write(f"{total:,} inputs in {took:.0f} s, {len(findings)} findings; corpora are in {CACHE}\n")
    for finding in findings:
        sys.stdout.write(f"\n{finding.where}, {finding.count} times\n{finding.trace}\n")
        sys.stdout.write(f"  again: make attack ARGS='replay {finding.file}'\n")
    return 1 if findings else 0


def _line(result: Result) -> str:
    tally = result.tally
    became = ", ".join(f"{outcome} {count / tally.inputs:.1%}" for outcome, count in tally.outcomes.most_common(6))
    return (
        f"{result.name:14}{tally.inputs:9,} inputs {tally.inputs / max(tally.seconds, 0.001):8,.0f}/s "
        f"{result.edges:6,} edges  slowest {tally.slowest * 1e3:6.1f} ms  peak {tally.peak / (1 << 20):5.1f} MiB "
        f"(resident {tally.resident >> 20})  {became}"
    )


if __name__ == "__main__":
    sys.exit(main())
