"""`python -m tests.gpu`, or `make gpu`: everything that needs a GPU in one command, with a report that names the
GPU.

Runs the tests marked `cuda`, among them the self-check and the budgets of launches, then the benchmarks of serving
and training on that GPU, against transformers and PEFT, and vLLM if it is installed. `ARGS=--quick` shortens the
benchmarks. The report is gpu.md in --out, next to the benchmarks' results.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks import command
from benchmarks.serving import report as serving
from benchmarks.serving.results import Results
from benchmarks.training import train_report as training
from server.errors import StartupError
from server.model.device import choose_device, driver_version, gpu_of

ROOT = Path(__file__).parent.parent
Run = Callable[[Sequence[str]], int]


def run(words: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    return subprocess.run(words, cwd=ROOT, check=False).returncode


def card(device: torch.device) -> str:
    """Return the GPU and its driver."""
    _, total = torch.cuda.mem_get_info(device)
    drives = f"driver {driver_version() or 'unknown'}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    return f"{gpu_of(device)}, {total / 2**30:.0f} GiB; {drives}"


def outcome(junit: Path) -> str:
    """Return the outcome of the tests, from pytest's report."""
    if not junit.is_file():
        return "the tests didn't run"
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    total, failed, errors, skipped = (
        int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
    )
    bad = failed + errors
    return f"{total - bad - skipped} tests passed, {bad} failed, {skipped} were skipped"


def main(arguments: Sequence[str] | None = None, run: Run = run) -> int:
    """Return the exit code: 0 if all tests passed and the benchmark ran."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "gpu", help="for the report")
    parser.add_argument("--quick", action="store_true", help="short benchmarks")
    given = parser.parse_args(arguments)
    try:
        device, dtype = choose_device("cuda", "auto")
    except StartupError as error:
        sys.stderr.write(f"make gpu: {error}\n")
        return 1
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    for old in ("tests.xml", "serve.json", "train.json"):
        (out / old).unlink(missing_ok=True)
    tests = run([sys.executable, "-m", "pytest", "-m", "cuda", f"--junitxml={out / 'tests.xml'}", "tests"])
    name = "bf16" if dtype is torch.bfloat16 else "fp32"
    flags = ["--device=cuda", f"--out={out}", *(["--quick"] if given.quick else [])]
    serves = run([sys.executable, "-m", "benchmarks.serve", f"--dtype={name}", *flags])
    trains = run([sys.executable, "-m", "benchmarks.train", f"--torch-dtype={name}", *flags])
    lines = [f"# {card(device)}", f"{datetime.now(UTC):%Y-%m-%d}: {outcome(out / 'tests.xml')}."]
    served, trained = command.read(out, "serve", Results), command.read(out, "train", training.Results)
    lines.append("The serving benchmark didn't end." if served is None else serving.markdown(served))
    lines.append("The training benchmark didn't end." if trained is None else training.markdown(trained))
    (out / "gpu.md").write_text("\n\n".join(lines), encoding="utf-8")
    sys.stdout.write(f"{lines[0]}\n{lines[1]}\nThe report: {out / 'gpu.md'}\n")
    return 1 if tests or serves or trains else 0


if __name__ == "__main__":
    raise SystemExit(main())
