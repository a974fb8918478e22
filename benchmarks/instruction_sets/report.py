"""Report of restricted instruction sets: a Markdown table and targets for each."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.command import QUICK, Made
from benchmarks.measure import median_ratio
from benchmarks.peers.venvs import LLAMA_CPP
from benchmarks.serving import report as serving
from benchmarks.serving.results import Results as Serving
from benchmarks.serving.systems.systems import BASE, DISTINCT, ONE, Load
from benchmarks.serving.targets import OF_BASE
from benchmarks.tables import rounds
from benchmarks.targets import Target, at_least, target_table, unmeasured

LOADS = (Load(1, BASE), Load(1, ONE), Load(32, BASE), Load(32, ONE), Load(32, DISTINCT))
TITLES = {"avx2": "AVX2", "avx512": "AVX-512 without bf16"}


@dataclass
class Results:
    """Results by instruction set. Each instruction set may be from another run."""

    sets: dict[str, Serving] = field(default_factory=dict)  # by instruction set

    @property
    def made(self) -> Made:
        """How the results were produced: by a quick run, if any of them was."""
        runs = [found.made for found in self.sets.values()]
        return next((made for made in runs if made.quick), runs[0])


def evaluate(found: Serving) -> list[Target]:
    """Evaluate the targets of one instruction set. A quick run reaches and misses none."""
    targets = list(_targets(found))
    return unmeasured(targets) if found.made.quick else targets


def _targets(found: Serving) -> Iterator[Target]:
    def speed(streams: int, kind: str, system: str | None = None) -> list[float]:
        row = found.row(streams, kind)
        return [] if row is None else row.speed() if system is None else row.speed(system)

    for streams, least in ((1, 1.0), (32, 1.3)):
        ratio = median_ratio(speed(streams, BASE), speed(streams, BASE, LLAMA_CPP))
        yield at_least(Load(streams, BASE).title, ratio, least, f"× {LLAMA_CPP}")
    ratio = median_ratio(speed(32, DISTINCT), speed(32, BASE))
    yield at_least(Load(32, DISTINCT).title, ratio, 0.8, OF_BASE)


def markdown(results: Results) -> str:
    """Describe what was run, and list the speeds and the targets of each set of instructions."""
    (first, *_) = results.sets.values()
    settings = first.settings
    work = (
        "smolora and llama.cpp, both compiled for fewer instructions than this processor has. Prompts of "
        f"{settings.prompt_tokens} tokens, {settings.max_tokens} new ones; {rounds(settings.rounds)}, all systems "
        "in turn"
    )
    parts = [f"{work}."]
    if results.made.quick:
        parts.append(QUICK)
    for name, found in results.sets.items():
        parts += [
            f"### {TITLES[name]}",
            f"`{found.made.program}`, {found.made.day}. {found.machine.hardware}.",
            "Output tokens per second:",
            serving.speed_table(found),
            "Targets:",
            target_table(evaluate(found)),
        ]
    return "\n\n".join(parts) + "\n"
