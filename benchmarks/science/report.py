"""Write docs/science.md and its charts from the results."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean

import torch

from benchmarks import command
from benchmarks.measure import Interval, standard_error
from benchmarks.science.costs import TASK, Costs, Curve, Curves
from benchmarks.science.plan import (
    DEFAULT_RANK,
    MORE_RANKS,
    MORE_RANKS_TASKS,
    RANKS,
    SAME_SIZE,
    SAME_SIZE_TASKS,
    Results,
    untrained,
)
from benchmarks.science.statistics import Difference, Verdict, difference, verdicts
from benchmarks.science.trial import Outcome
from benchmarks.tables import gigabytes, table, with_range
from benchmarks.training.tasks import TASKS
from server.training.spec import ALPHA, INIT_STD, LEARNING_RATES

LOSS_MARGIN = 0.02
"""A share of full fine-tuning's loss that doesn't matter."""
SHARE_MARGIN = 0.01
"""A share of right rows that doesn't matter."""
VALLEY = 1.1
"""A rate is in the valley if its loss is at most the best one's times this."""
METHODS = (0, *RANKS)


@dataclass(frozen=True)
class Compared:
    """A rank on a task, compared with full fine-tuning."""

    task: str
    rank: int
    loss: Difference
    share: Difference


def write(folder: Path, page: Path) -> None:
    """Write the page and its charts. Name what wasn't measured."""
    found = {task: kept for task in TASKS if (kept := command.read(folder, task, Results)) is not None}
    costs, curves = command.read(folder, "costs", Costs), command.read(folder, "curves", Curves)
    page.write_text(text(found, costs, curves), encoding="utf-8")
    if found:
        _chart(found, page.parent / "science-rates.png", "learning rate", _rate_points, is_log=True)
        _chart(found, page.parent / "science-forgetting.png", "loss on the base's own answers", _front)


def summary(folder: Path) -> str | None:
    """Return the README's part: the costs, and the accuracy on one task if it was tested. None without costs."""
    costs = command.read(folder, "costs", Costs)
    if costs is None:
        return None
    native = [costs.of(rank, is_native=True) for rank in (0, DEFAULT_RANK)]
    speed = native[1].tokens_per_second / native[0].tokens_per_second
    parts = [
        f"{costs.model} on {costs.machine.threads} threads of an {costs.machine.processor}, 8 sentences a step. "
        f"The same code computes both methods: by native code, LoRA of rank {DEFAULT_RANK} trains {speed:.1f} × "
        f"as many tokens a second, in {native[1].peak_memory / native[0].peak_memory:.2f} of the memory.",
        cost_table(costs),
    ]
    results = command.read(folder, TASK, Results)
    if results is not None and all(results.tests(rank) for rank in METHODS):
        num_train, _, num_test = results.described.num_rows
        accuracies = ", ".join(
            f"{_method(rank)} {_mean(results.tests(rank), lambda one: one.share_right)} "
            f"(rate {results.best(rank):.2g})"
            for rank in METHODS
        )
        error = 100 * standard_error(fmean(one.share_right for one in results.tests(0)), num_test)
        parts.append(
            f"{results.described.title}, {results.described.measure}: {num_train:,} rows to train on, "
            f"{num_test:,} others in the test, each method at its best rate, alpha {ALPHA:g}, mean ± half of a "
            f"95 % interval over {len(results.tests(0))} seeds: {accuracies}. The test's own standard error is "
            f"{error:.1f} points."
        )
    parts.append("[docs/science.md](docs/science.md) has the comparison's protocol and figures.")
    return "\n\n".join(parts)


def text(found: dict[str, Results], costs: Costs | None, curves: Curves | None) -> str:
    """Return the page."""
    compared = compare(found)
    done = {one.task for one in compared}
    missing = [task for task in TASKS if task not in done]
    parts = [INTRODUCTION.strip()]
    if missing:
        parts.append(f"Tasks that aren't measured to the end yet: {', '.join(missing)}.")
    if found:
        parts += [_setup(found), "## Learning rates", *_rates(found), "## Forgetting", *_forgetting(found)]
    if compared:
        parts += ["## Quality", *_quality(found, compared)]
    if costs is not None:
        parts += ["## Costs", *_costs(costs, curves)]
    same_size = [(8, "all"), *((rank, targets) for targets, rank in SAME_SIZE)]
    ranks = [(rank, "all") for rank in sorted((*MORE_RANKS, *RANKS))]
    for title, rows in (
        ("Equal parameters", _variants(found, SAME_SIZE_TASKS, same_size)),
        ("Rank", _variants(found, MORE_RANKS_TASKS, ranks)),
        ("The default rate", _defaults(found)),
    ):
        if rows is not None:
            parts += [f"## {title}", rows]
    if compared:
        parts += ["## Claims", _claims(found, compared, costs)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = f"""# LoRA against full fine-tuning

`python -m benchmarks.science` measures, keeps every run in `benchmarks/results/science/`, continues where it was
interrupted, and writes this page. Don't edit it by hand. `--again` repeats a kept run and compares the figures:
`python -m benchmarks.science --again "sentiment, r=8, 0.001, seed 10, test"`.

- **Methods**: full fine-tuning, and LoRA of rank 8, 16 and 32 on all seven linear modules. At every rank alpha
  is {ALPHA:g}, A is drawn from N(0, (1/{1 / INIT_STD:g})²) and B is 0, which are the service's defaults. AdamW
  without decay, 8 rows a step, cosine schedule, bf16 weights with fp32 masters. All methods see the same rows in
  the same order.
- **Rates**: steps of two around a centre, with one seed, until the best is inside the grid; then steps of √2
  around the best, with two seeds. The loss on validation rows decides.
- **Test**: five other seeds at the chosen rate, on rows that no choice has seen. A row is right if its greedy
  completion is exact, with its end. Losses are in nats per token of the completion, without its end token.
- **Verdicts**, fixed before the tests: differences from full fine-tuning are paired by row and seed. 95 %
  intervals come from a bootstrap over rows and seeds. LoRA is *no worse* if the difference is below
  {LOSS_MARGIN:.0%} of the loss, or one point of right rows, and else *worse* if it is above 0, both with 97.5 %
  confidence after Holm's correction for all tasks and ranks.
"""


def compare(found: dict[str, Results]) -> list[Compared]:
    """Compare each rank on each task that was tested to the end."""
    compared = []
    for task, results in found.items():
        full = results.tests(0)
        for rank in RANKS:
            lora = results.tests(rank)
            if full and len(full) == len(lora):
                loss, share = _differences(results, full, lora)
                compared.append(Compared(task, rank, loss, share))
    return compared


def _differences(
    results: Results, full: Sequence[Outcome], lora: Sequence[Outcome]
) -> tuple[Difference, Difference]:
    counts = torch.tensor(results.described.num_tokens, dtype=torch.float64)
    losses, right = (
        [torch.tensor([of(one) for one in method], dtype=torch.float64) for method in (full, lora)]
        for of in (_losses, _are_right)
    )
    margin = LOSS_MARGIN * float(losses[0].sum() / counts.sum() / len(full))
    return (
        difference(losses[1] - losses[0], counts, margin),
        difference(right[0] - right[1], torch.ones_like(counts), SHARE_MARGIN),
    )


def _losses(one: Outcome) -> list[float]:
    return list(one.losses)


def _are_right(one: Outcome) -> list[float]:
    return [float(digit) for digit in one.are_right]


def _setup(found: dict[str, Results]) -> str:
    rows = [
        [
            results.described.title,
            " / ".join(f"{number:,}" for number in results.described.num_rows),
            str(results.described.epochs),
            f"{results.described.num_trained:,}",
            str(len(results.outcomes)),
            f"{results.hours:.1f}",
        ]
        for results in found.values()
    ]
    head = ("task", "rows: training / validation / test", "epochs", "training tokens", "runs", "hours")
    machines = {str(machine): machine for results in found.values() for machine in results.machines}
    return "\n\n".join(
        [table(head, rows), "Two runs at a time, on one thread each:", *(f"- {line}" for line in machines)]
    )


def _quality(found: dict[str, Results], compared: Sequence[Compared]) -> Iterator[str]:
    rows = []
    for results in found.values():
        base = results.of(untrained(results.task))
        if base is None or not all(results.tests(rank) for rank in METHODS):
            continue
        shares = [_mean(results.tests(rank), lambda one: one.share_right) for rank in METHODS]
        losses = [_mean(results.tests(rank), lambda one: one.loss, "{:.4f}") for rank in METHODS]
        title = f"{results.described.title}, {results.described.measure}"
        rows += [[title, f"{base.share_right:.3f}", *shares], ["loss", f"{base.loss:.4f}", *losses]]
        if results.described.measure == "exact match":
            tokens = [_mean(results.tests(rank), lambda one: one.token_accuracy) for rank in METHODS]
            rows.append(["tokens right", f"{base.token_accuracy:.3f}", *tokens])
    head = ("mean ± half of a 95 % interval over five seeds", "base", "full", *(f"r={rank}" for rank in RANKS))
    yield table(head, rows)
    yield "LoRA minus full fine-tuning, with 95 % intervals; positive is worse:"
    by_loss = verdicts([one.loss for one in compared])
    by_share = verdicts([one.share for one in compared])
    rows = [
        [
            one.task,
            str(one.rank),
            _interval(one.loss, 1, "{:+.4f}"),
            loss,
            _interval(one.share, 100, "{:+.1f}"),
            share,
        ]
        for one, loss, share in zip(compared, by_loss, by_share, strict=True)
    ]
    yield table(("task", "rank", "loss", "verdict", "points of wrong rows", "verdict"), rows)
    for name, found_verdicts in (("loss", by_loss), ("right rows", by_share)):
        yield f"By {name}: {_counted(found_verdicts)}."


def _counted(found: Sequence[Verdict]) -> str:
    kinds: tuple[Verdict, ...] = ("no worse", "worse", "can't tell")
    return ", ".join(f"{kind} {found.count(kind)} of {len(found)}" for kind in kinds)


def _interval(one: Difference, factor: float, form: str) -> str:
    low, high = form.format(factor * one.low), form.format(factor * one.high)
    return f"{form.format(factor * one.mean)} ({low} to {high})"


def _mean(outcomes: Sequence[Outcome], figure: Callable[[Outcome], float], form: str = "{:.3f}") -> str:
    return Interval.of([figure(one) for one in outcomes]).text(form)


def _rates(found: dict[str, Results]) -> Iterator[str]:
    yield (
        "Best rate by the validation rows, and in brackets the valley: the rates of the grid around it whose loss "
        f"is at most {VALLEY - 1:.0%} above the best. *Ratio*: the best rate of rank 16 over full fine-tuning's."
    )
    rows = []
    for results in found.values():
        best = {rank: results.best(rank) for rank in METHODS}
        cells = [_valley(results, rank, rate) if rate else "–" for rank, rate in best.items()]
        full, lora = best[0], best[DEFAULT_RANK]
        rows.append([results.task, *cells, f"{lora / full:.0f}" if lora and full else "–"])
    yield table(("task", "full", *(f"r={rank}" for rank in RANKS), "ratio"), rows)
    yield "![Validation loss by learning rate](science-rates.png)"


def _valley(results: Results, rank: int, best: float) -> str:
    losses = {rate: fmean(one.loss for one in by_seed.values()) for rate, by_seed in results.losses(rank).items()}
    rates = list(losses)
    low = high = rates.index(best)
    while low and losses[rates[low - 1]] <= VALLEY * losses[best]:
        low -= 1
    while high + 1 < len(rates) and losses[rates[high + 1]] <= VALLEY * losses[best]:
        high += 1
    return f"{best:.2g} ({rates[low]:.2g}–{rates[high]:.2g})"


def _costs(costs: Costs, curves: Curves | None) -> Iterator[str]:
    yield (
        f"{costs.machine}. {costs.model}, {TASK}, 8 rows a step; medians of three rounds, all methods in turn, "
        "each in a fresh process."
    )
    yield cost_table(costs)
    for code, is_native in (("native code", True), ("torch", False)):
        full, lora = costs.of(0, is_native=is_native), costs.of(DEFAULT_RANK, is_native=is_native)
        speed, memory = lora.tokens_per_second / full.tokens_per_second, lora.peak_memory / full.peak_memory
        yield f"By {code}, rank {DEFAULT_RANK} has {speed:.2f} × full's tokens/s, in {memory:.2f} of its memory."
    if curves is not None:
        target = min(loss for _, loss in curves.by_rank[0])
        yield (
            "Seconds of training, without measuring, until full fine-tuning's best validation loss, "
            f"{target:.4f}, by native code:"
        )
        reached = [_reached(curves.by_rank[rank], target) for rank in METHODS]
        yield table(("full", *(f"r={rank}" for rank in RANKS)), [reached])
    yield (
        "Only adapters can be served together: [benchmarks.md](benchmarks.md) has the speed of 32 requests with "
        "32 adapters on one base."
    )


def _reached(curve: Curve, target: float) -> str:
    """Return the seconds until the loss is reached."""
    reached = [seconds for seconds, loss in curve if loss <= target]
    return f"{reached[0]:.0f}" if reached else f"not within {curve[-1][0]:.0f}"


def cost_table(costs: Costs) -> str:
    """Tabulate memory, storage and speed of each method."""
    rows = []
    for rank in METHODS:
        native, in_torch = (costs.of(rank, is_native=is_native) for is_native in (True, False))
        rows.append(
            [
                _method(rank),
                f"{native.num_trainable:,}",
                *(megabytes(number) for number in (native.optimizer_bytes, native.checkpoint_bytes)),
                f"{megabytes(native.stored_bytes)} ({megabytes(2 * native.num_trainable)})",
                *(gigabytes(one.peak_memory) for one in (native, in_torch)),
                *(with_range(costs.speeds(rank, is_native=code), "{:.0f}".format) for code in (True, False)),
            ]
        )
    head = (
        *("method", "trainable parameters", "optimizer state", "checkpoint", "stored (in 16 bits)"),
        *("peak memory: native", "torch", "tokens/s: native", "torch"),
    )
    return table(head, rows)


def _method(rank: int) -> str:
    return f"LoRA, r={rank}" if rank else "full fine-tuning"


def megabytes(number: float) -> str:
    return f"{number / 1e6:,.0f} MB"


def _forgetting(found: dict[str, Results]) -> Iterator[str]:
    yield (
        "How much the loss rises on 200 answers that the base itself gave to general prompts, and on 40 pieces of "
        "Python's help, at each method's tuned rate; mean of the tests. The chart has all rates of one seed: each "
        "method's curve shows which forgetting a validation loss costs."
    )
    rows = []
    for results in found.values():
        base = results.of(untrained(results.task))
        if base is None:
            continue
        for name, figure in (("answers", _answers_loss), ("text", _text_loss)):
            cells = []
            for rank in METHODS:
                tests = results.tests(rank)
                cells.append(f"{fmean(map(figure, tests)) - figure(base):+.3f}" if tests else "–")
            rows.append([f"{results.task}, {name}", *cells])
    yield table(("task", "full", *(f"r={rank}" for rank in RANKS)), rows)
    yield "![Forgetting by validation loss](science-forgetting.png)"


def _answers_loss(one: Outcome) -> float:
    return one.answers_loss


def _text_loss(one: Outcome) -> float:
    return one.text_loss


def _variants(found: dict[str, Results], tasks: Sequence[str], methods: Sequence[tuple[int, str]]) -> str | None:
    """Tabulate variants of LoRA at their best rates. Return None if fewer than two were tested."""
    rows = []
    for task in tasks:
        for rank, targets in methods:
            tests = found[task].tests(rank, targets) if task in found else []
            if not tests:
                continue
            rate = tests[0].trial.learning_rate
            rows.append(
                [
                    *(task, f"{targets}, r={rank}", f"{tests[0].num_trainable:,}", f"{rate:.2g}"),
                    _mean(tests, lambda one: one.loss, "{:.4f}"),
                    _mean(tests, lambda one: one.share_right),
                ]
            )
    head = ("task", "modules and rank", "parameters", "rate", "test loss", "right")
    return table(head, rows) if len(rows) > 1 else None


def _defaults(found: dict[str, Results]) -> str | None:
    """Compare the default rate with the best one. Return None if no task has both."""
    usual_rate = LEARNING_RATES["lora"]
    title = f"Rank {DEFAULT_RANK} at the service's default rate, {usual_rate:g}, and at the task's best rate:"
    rows = []
    for results in found.values():
        usual = results.tests_at(usual_rate, DEFAULT_RANK)
        tuned = results.tests(DEFAULT_RANK)
        if usual and tuned:
            cells = [_mean(tests, lambda one: one.loss, "{:.4f}") for tests in (usual, tuned)]
            cells += [_mean(tests, lambda one: one.share_right) for tests in (usual, tuned)]
            rows.append([results.task, f"{results.best(DEFAULT_RANK):.2g}", *cells])
    head = ("task", "best rate", "loss at the default", "at the best", "right at the default", "at the best")
    return f"{title}\n\n{table(head, rows)}" if rows else None


def _claims(found: dict[str, Results], compared: Sequence[Compared], costs: Costs | None) -> str:
    """Tabulate what papers say, next to what was measured here."""
    rates = [(results.best(0), results.best(DEFAULT_RANK)) for results in found.values()]
    ratios = [lora / full for full, lora in rates if full and lora]
    ratio = f"{geometric_mean(ratios):.0f} ({min(ratios):.0f}–{max(ratios):.0f})" if ratios else "not measured yet"
    by_loss = verdicts([one.loss for one in compared])
    quality = f"{_counted(by_loss)}, by loss" if compared else "not measured yet"
    speed = "not measured yet"
    if costs is not None:
        full, lora = (costs.of(rank, is_native=True).tokens_per_second for rank in (0, DEFAULT_RANK))
        speed = f"{full / lora:.2f} of the time for a token, by native code"
    rows = [
        [
            "LoRA is on a par with full fine-tuning, or better",
            "Hu et al. 2021, arXiv:2106.09685: GPT-3 on MNLI 91.7 against 89.5, on WikiSQL 73.4 against 73.8",
            quality,
        ],
        [
            "LoRA's best rate is about 10 times full fine-tuning's",
            "Schulman et al. 2025, *LoRA without regret*",
            f"{ratio} times at rank {DEFAULT_RANK}, with alpha {ALPHA:g}",
        ],
        [
            "Adapting attention alone is worse than the feed-forward layers alone, at equal parameters",
            "the same",
            _attention_claim(found),
        ],
        ["LoRA takes about two thirds of the arithmetic", "the same", speed],
        [
            "LoRA learns less and forgets less",
            "Biderman et al. 2024, arXiv:2405.09673: code and mathematics, 7B",
            _forgetting_claim(found),
        ],
    ]
    return table(("claim", "source", "here"), rows)


def _attention_claim(found: dict[str, Results]) -> str:
    losses = []
    for task in SAME_SIZE_TASKS:
        tests = [found[task].tests(rank, targets) if task in found else [] for targets, rank in SAME_SIZE[1:]]
        if all(tests):
            attention, feed_forward = (fmean(one.loss for one in outcomes) for outcomes in tests)
            losses.append(f"{task} {attention:.4f} against {feed_forward:.4f}")
    return ", ".join(losses) or "not measured yet"


def _forgetting_claim(found: dict[str, Results]) -> str:
    tasks = [results for results in found.values() if results.tests(0) and results.tests(DEFAULT_RANK)]
    less = [
        results.task
        for results in tasks
        if fmean(map(_answers_loss, results.tests(DEFAULT_RANK))) < fmean(map(_answers_loss, results.tests(0)))
    ]
    if not tasks:
        return "not measured yet"
    return f"rank {DEFAULT_RANK} forgets less of the base's answers on {len(less)} of {len(tasks)} tasks"


def _chart(
    found: dict[str, Results],
    path: Path,
    x_title: str,
    points: Callable[[Results, int], list[tuple[float, float]]],
    *,
    is_log: bool = False,
) -> None:
    """Draw a panel for each task, with a line for each method."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for axes, results in zip(grid.flat, found.values(), strict=False):
        for rank, color in zip(METHODS, ("#c9ada7", "#9db4c0", "#2a6f97", "#81b29a"), strict=True):
            drawn = points(results, rank)
            label = f"LoRA, r={rank}" if rank else "full"
            axes.plot([x for x, _ in drawn], [y for _, y in drawn], "o-", color=color, markersize=3, label=label)
        axes.set_title(results.task, fontsize=9)
        axes.set_yscale("log")
        if is_log:
            axes.set_xscale("log")
        axes.tick_params(labelsize=7, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(found) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), frameon=False, fontsize=8)
    figure.supxlabel(x_title, fontsize=9)
    figure.supylabel("validation loss", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _rate_points(results: Results, rank: int) -> list[tuple[float, float]]:
    return [
        (rate, fmean(one.loss for one in by_seed.values()))
        for rate, by_seed in results.losses(rank).items()
        if all(math.isfinite(one.loss) for one in by_seed.values())
    ]


def _front(results: Results, rank: int) -> list[tuple[float, float]]:
    return [
        (by_seed[0].answers_loss, by_seed[0].loss)
        for by_seed in results.losses(rank).values()
        if 0 in by_seed and math.isfinite(by_seed[0].loss)
    ]
