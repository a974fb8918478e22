"""Rounds that each measure everything once, all systems in turn, with new prompts.

The order of systems rotates from load to load and from round to round, so that drift of the machine favours no
system. Idle systems block on a message and use no processor time.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from benchmarks.command import Say
from benchmarks.measure import Figures, Run, percentile
from benchmarks.prompts import PromptSource
from benchmarks.serving.bandwidth import bandwidth
from benchmarks.serving.options import Options
from benchmarks.serving.own_parts import OwnParts
from benchmarks.serving.results import Results, Row
from benchmarks.serving.systems.systems import BASE, OURS, Load, Streams, System
from benchmarks.serving.systems.wires import Request

SAME_START = 20
"""Number of characters compared at the beginning of answers."""


class Rounds:
    """All rounds. Our system is the first of `systems`; `names` are adapters that all systems know."""

    def __init__(
        self,
        options: Options,
        prompts: PromptSource,
        names: Sequence[str],
        systems: Sequence[System],
        own: OwnParts,
        say: Say,
    ) -> None:
        self._options = options
        self._prompts = prompts
        self._names = names
        self._systems = systems
        self._own = own
        self._say = say
        self._figures: dict[Load, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
        self._cached: dict[Load, int] = defaultdict(int)
        self._same: dict[Load, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        self._first: dict[str, list[float]] = defaultdict(list)
        self._resent: Counter[str] = Counter()

    def run(self, results: Results) -> None:
        """Run all rounds; store the figures in `results`."""
        options = self._options
        self._warm_up()
        speeds = []
        for number in range(options.rounds):
            speeds.append(bandwidth(options.threads, 1 << (24 if options.quick else 30)))
            for index, load in enumerate(options.loads):
                self._say(f"round {number + 1} of {options.rounds}: {load.title}")
                self._load(load, self._in_turn(number + index))
            if options.wants("ttft"):
                self._say(f"round {number + 1}: time to first token")
                self._first_tokens(self._in_turn(number))
            self._own.round(number)
        results.bandwidth = tuple(speeds)
        results.rows = [self._row(load) for load in options.loads]
        results.first_token = {name: tuple(seconds) for name, seconds in self._first.items()}
        self._own.finish(results)
        self._resent[OURS] += self._own.num_resent
        results.resent = dict(+self._resent)

    def _in_turn(self, shift: int) -> list[System]:
        shift %= len(self._systems)
        return [*self._systems[shift:], *self._systems[:shift]]

    def _warm_up(self) -> None:
        """Load every adapter and run every kernel before anything is measured."""
        self._say("warming up")
        streams = max(self._options.streams)
        adapters = Load(min(len(self._names), streams), "distinct")
        for system in self._systems:
            for load in (Load(1, BASE), Load(streams, BASE), Load(1, "one"), Load(streams, "one"), adapters):
                if system.can(load):
                    self._run(system, load, self._take(load.streams), 4)

    def _load(self, load: Load, systems: Sequence[System]) -> None:
        """Run one load with the same prompts on all systems."""
        texts = self._take(load.streams * self._options.requests_of(load.streams))
        runs: dict[str, Run] = {}
        for system in systems:
            if system.can(load):
                name = system.facts.name
                runs[name] = self._run(system, load, texts, self._options.max_tokens)
                self._figures[load][name].append(Figures.of(runs[name]))
                self._say(f"  {name}: {self._figures[load][name][-1].tokens_per_second:.1f} tokens/s")
        ours = runs[OURS]
        self._cached[load] += ours.num_cached_tokens
        for name, run in runs.items():
            if name != OURS:
                pairs = zip(ours.texts, run.texts, strict=True)
                self._same[load][name] += [our[:SAME_START] == their[:SAME_START] for our, their in pairs]

    def _run(self, system: System, load: Load, texts: Sequence[str], max_tokens: int) -> Run:
        parts = load.parts(self._names)
        return self._answers(
            system,
            [
                [Request(text, parts[stream], max_tokens) for text in texts[stream :: load.streams]]
                for stream in range(load.streams)
            ],
        )

    def _answers(self, system: System, streams: Streams) -> Run:
        run = system.run(streams)
        self._resent[system.facts.name] += run.num_resent
        return run

    def _first_tokens(self, systems: Sequence[System]) -> None:
        texts = self._take(self._options.first_tokens)
        for system in systems:
            found = [self._answers(system, [[Request(text, (), 1)]]).first_token[0] for text in texts]
            self._first[system.facts.name].append(percentile(found, 50))

    def _row(self, load: Load) -> Row:
        figures = self._figures[load]
        return Row(
            load,
            {system.facts.name: tuple(figures[system.facts.name]) for system in self._systems if system.can(load)},
            self._cached[load],
            {name: sum(same) / len(same) for name, same in self._same[load].items()},
        )

    def _take(self, count: int) -> list[str]:
        return self._prompts.take(count, self._options.prompt_tokens)
