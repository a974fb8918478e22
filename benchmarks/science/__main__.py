"""Compare LoRA with full fine-tuning on six tasks: `python -m benchmarks.science`.

All methods see the same rows, in the same order, for the same number of steps, and LoRA of every rank has the
service's default alpha and initial values. A method's learning rate is chosen by the loss on validation rows, with
two seeds. It is then trained with five other seeds, and measured on test rows that no choice has seen. Outcomes
are kept, so an interrupted comparison resumes. Writes the results and docs/science.md.
"""

import sys
from pathlib import Path

from benchmarks import command
from benchmarks.command import positive
from benchmarks.machine import Machine
from benchmarks.science import report
from benchmarks.science.answers import write_answers
from benchmarks.science.costs import measure_costs
from benchmarks.science.plan import PARTS, Store, carry_out
from benchmarks.science.trial import Place
from benchmarks.training.tasks import TASKS
from server.model.base.source import resolve_base


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and write the page."""
    parser = command.parser("benchmarks.science", "Compare LoRA with full fine-tuning on six tasks.")
    parser.set_defaults(out=Path("benchmarks/results"), threads=1)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the data is kept")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=PARTS, help="costs: alone, on a quiet machine"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--processes", type=positive, default=command.cores(), help="runs at the same time")
    parser.add_argument("--page", type=Path, default=Path("docs/science.md"), help="the page to write")
    parser.add_argument("--again", metavar="KEY", help="repeat one run, and compare it with the kept one")
    options = parser.parse_args(arguments)
    say = command.speaker()
    folder = options.out / ("science-quick" if options.quick else "science")
    folder.mkdir(parents=True, exist_ok=True)
    base = resolve_base(options.model, options.home, progress=say)
    write_answers(base, folder, say, 8 if options.quick else None)
    place = Place(
        *(base, options.home / "native", options.cache, folder, options.threads),
        num_rows=16 if options.quick else None,
    )
    with Store(folder, place, Machine.this(options.threads), options.processes, say) as store:
        if options.again:
            sys.exit(0 if store.repeats(options.again) else 1)
        carry_out(store, options.parts, options.tasks, options.processes)
        if "costs" in options.parts:
            measure_costs(store, place, folder, say)
    report.write(folder, folder / "science.md" if options.quick else options.page)


if __name__ == "__main__":
    main()
