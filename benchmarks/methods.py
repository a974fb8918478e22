"""Compare full fine-tuning with LoRA of three ranks: `python -m benchmarks.methods`.

All methods see the same rows for the same number of steps. Each method's learning rate is chosen by the loss on
tuning rows, which are used neither for training nor for testing. The grid of rates grows until the best rate is
inside. Then the method is trained again with three other seeds, and those models are tested. Every run is a
process of its own, so that peak memory is measured per run. Runs are stored: an interrupted comparison resumes.
Writes methods.json.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if not __package__:  # run by its path: Python put this folder first, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import command
from benchmarks.command import Made, positive
from benchmarks.machine import Machine
from benchmarks.training.methods_report import Compared, Results, markdown
from benchmarks.training.methods_run import Outcome, Place, Trial, outcome_of
from benchmarks.training.rate_search import best_rate
from benchmarks.training.ratings import FILES, source_directory
from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from server.training.spec import Method

RANKS = (8, 16, 32)
CENTRES: dict[Method, float] = {"lora": 5e-4, "full": 5e-5}
"""Initial learning rates of the search."""
TUNING_SEED = 0
TIMED_RANK, TIMED_ROWS = 16, 320
"""The run that times LoRA in torch, in which full fine-tuning is computed too."""


def main(arguments: list[str] | None = None) -> Results:
    """Run what is still missing; return, print and write the results."""
    parser = command.parser("benchmarks.methods", "Compare full fine-tuning with LoRA of three ranks.")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the data is kept")
    parser.add_argument("--data", choices=list(FILES), default="movies", help="the set to train on")
    parser.add_argument("--rows", type=positive, default=2400, help="training rows, for one epoch in steps of 8")
    parser.add_argument("--tuning-rows", type=positive, default=250, help="rows for choosing the learning rates")
    parser.add_argument("--test-rows", type=positive, default=1000)
    parser.add_argument("--seeds", type=int, choices=range(1, 6), default=3, help="number of seeds to test")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.tuning_rows, options.test_rows, options.seeds = 16, 8, 8, 1
    say = command.speaker()
    kept = options.out / ("methods-quick" if options.quick else "methods")
    kept.mkdir(parents=True, exist_ok=True)
    converted = resolve_base(options.model, options.home, progress=say)
    source = source_directory(options.cache, say)
    digest = load_base(converted).digest
    place = Place(converted, digest, source, options.data, options.threads, options.home / "native", kept)

    def run(trial: Trial) -> Outcome:
        outcome, before = outcome_of(trial, place)
        say(
            f"{trial.title} at {trial.learning_rate:.3g}, seed {trial.seed}{' (kept)' if before else ''}: "
            f"{outcome.tokens_per_second:.0f} tokens/s, tuning loss {outcome.tuning_loss:.4f}, "
            f"test loss {outcome.test_loss:.4f}, accuracy {outcome.test_accuracy:.3f}"
        )
        return outcome

    counts = (options.rows, options.tuning_rows, options.test_rows)
    compared, in_torch = compare(run, counts, options.seeds)
    results = Results(
        Made.by("benchmarks.methods", arguments, quick=options.quick),
        Machine.this(options.threads),
        Path(options.model).name,
        options.data,
        counts,
        compared,
        in_torch,
    )
    command.write(options.out, "methods", results)
    print(markdown(results))
    return results


def compare(
    run: Callable[[Trial], Outcome], counts: tuple[int, int, int], num_seeds: int
) -> tuple[list[Compared], Outcome]:
    """Compare each method at its best rate, full fine-tuning first; also time LoRA in torch.

    `counts` are the rows to train on, to choose the rate by, and to test on.
    """
    num_rows, num_tuning, num_test = counts
    compared = {}
    for rank in (0, *RANKS):
        centre = CENTRES["lora" if rank else "full"]
        tried = Trial(rank, centre, TUNING_SEED, num_rows, num_tuning, 0)

        def loss_at(rate: float, tried: Trial = tried) -> float:
            return run(replace(tried, learning_rate=rate)).tuning_loss

        rate, losses = best_rate(centre, loss_at)
        tested = replace(tried, learning_rate=rate, num_tuning=0, num_test=num_test)
        outcomes = tuple(run(replace(tested, seed=seed)) for seed in range(1, num_seeds + 1))
        compared[rank] = Compared(rank, rate, losses, outcomes)
    timed = Trial(TIMED_RANK, compared[TIMED_RANK].rate, 1, min(TIMED_ROWS, num_rows), 0, 0, native=False)
    return list(compared.values()), run(timed)


if __name__ == "__main__":
    main()
