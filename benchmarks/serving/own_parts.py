"""Measurements of our server alone, each once per round."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.command import Say
from benchmarks.measure import percentile
from benchmarks.peers.transformers_peft import TransformersPeft
from benchmarks.prompts import PromptSource
from benchmarks.serving import overload
from benchmarks.serving.load import drive, interfere
from benchmarks.serving.options import Options
from benchmarks.serving.overload import Overload
from benchmarks.serving.page_cache import drop, read_seconds
from benchmarks.serving.results import Cold, LongPrompts, Results, Ways
from benchmarks.serving.systems.systems import OurServer
from benchmarks.serving.systems.wires import Part, Request, Smolora, Usage

GREEDY = Request("", (), 0)
WAYS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.7, top_p=0.9),
    "logprobs": replace(GREEDY, logprobs=5),
}


class OwnParts:
    """Measurements of our server. `cold` are directories of adapters not uploaded yet; each is used once."""

    def __init__(
        self,
        options: Options,
        max_positions: int,
        prompts: PromptSource,
        many_prompts: PromptSource,
        cold: Sequence[Path],
        ours: OurServer,
        peft: TransformersPeft | None,
        say: Say,
    ) -> None:
        """Prepare the measurements. `many_prompts` yields more prompts, which may share their first token."""
        self._options = options
        self._max_positions = max_positions
        self._prompts = prompts
        self._many_prompts = many_prompts
        self._cold = list(cold)
        self._ours = ours
        self._url = ours.server.url
        self._peft = peft
        self._say = say
        self._wire = Smolora()
        self._cold_rounds: list[tuple[float, ...]] = []
        self._long_rounds: list[tuple[float, ...]] = []
        self._ways: dict[int, list[dict[str, float]]] = {}
        self._overloads: list[overload.Round] = []
        self.num_resent = 0

    def round(self, number: int) -> None:
        """Measure each wanted part once."""
        parts = {
            "ways": lambda: self._all_ways(number),
            "cold": self._cold_adapters,
            "long": self._long_prompts,
            "overload": self._overload,
        }
        for name, measure in parts.items():
            if self._options.wants(name):
                self._say(f"round {number + 1}: {name}")
                measure()

    def finish(self, results: Results) -> None:
        """Store the measurements in `results`."""
        options = self._options
        if self._cold_rounds:
            results.cold = Cold(*zip(*self._cold_rounds, strict=True))
        if self._long_rounds:
            found = zip(*self._long_rounds, strict=True)
            results.long_prompts = LongPrompts(options.long_streams, self._long_tokens, options.long_every, *found)
        results.ways = [
            Ways(streams, **{way: tuple(one[way] for one in rounds) for way in WAYS})
            for streams, rounds in self._ways.items()
        ]
        if self._overloads:
            columns = zip(
                *((one.peak, one.goodput, one.offered, one.refused, one.first_token) for one in self._overloads),
                strict=True,
            )
            results.overload = Overload(max(options.streams), options.overload_seconds, *columns)

    def _all_ways(self, number: int) -> None:
        names = list(WAYS)
        for streams in (min(self._options.streams), max(self._options.streams)):
            found: dict[str, float] = {}
            count = streams * self._options.requests_of(streams)
            shift = number % len(names)
            for way in (*names[shift:], *names[:shift]):
                texts = self._prompts.take(count, self._options.prompt_tokens)
                requests = [replace(WAYS[way], prompt=text, max_tokens=self._options.max_tokens) for text in texts]
                run = self._ours.run([requests[stream::streams] for stream in range(streams)])
                found[way] = run.num_tokens / run.seconds
                self.num_resent += run.num_resent
            self._ways.setdefault(streams, []).append(found)

    def _cold_adapters(self) -> None:
        """Request each adapter just after its upload, after dropping it from the page cache, and when it is
        resident."""
        uploaded, dropped, queue, cached, disk, peft = ([] for _ in range(6))
        packed: list[float] = []
        for _ in range(self._options.cold):
            for forget in (False, True):
                directory = self._cold.pop()
                name = f"cold-{len(self._cold)}"
                file, *rest = self._ours.server.stored(self._ours.server.upload(name, directory))
                if not forget:
                    seconds, queued = self._cold_seconds(name)
                    uploaded.append(seconds)
                    queue.append(queued)
                    cached.append(read_seconds(file))
                    packed += map(read_seconds, rest)
                    if self._peft is not None:
                        peft.append(self._peft.load_adapter(name, directory))
                elif all(map(drop, (file, *rest))):  # or this file system doesn't evict them
                    disk.append(read_seconds(file))
                    drop(file)
                    dropped.append(self._cold_seconds(name)[0])
        columns = (uploaded, dropped, queue, cached, disk, peft, packed)
        self._cold_rounds.append(tuple(percentile(values, 50) for values in columns))

    def _cold_seconds(self, name: str) -> tuple[float, float]:
        """Return the extra time to first token and the extra queue time compared with the resident adapter."""
        found = []
        for text in self._prompts.take(2, self._options.prompt_tokens):
            (answer,) = drive(self._url, self._wire, [[Request(text, (Part(name),), 1)]])
            assert isinstance(answer.usage, Usage)
            self.num_resent += answer.num_resent
            found.append((answer.first_token, answer.usage.queue_seconds))
        (cold, cold_queue), (resident, resident_queue) = found
        return cold - resident, cold_queue - resident_queue

    @property
    def _long_tokens(self) -> int:
        return min(self._options.long_tokens, self._max_positions // 2)

    def _long_prompts(self) -> None:
        options = self._options
        longest = min(self._max_positions, 8192) - options.prompt_tokens
        running = self._prompts.take(options.long_streams, options.prompt_tokens)
        arriving = self._prompts.take(options.long_prompts, self._long_tokens)
        quiet, disturbed, first = interfere(
            self._url,
            self._wire,
            [Request(text, (), longest) for text in running],
            [Request(text, (), 1) for text in arriving],
            options.long_every,
        )
        figures = [percentile(gaps, percent) for gaps in (quiet, disturbed) for percent in (50, 99)]
        self._long_rounds.append((*figures, percentile(first, 50)))

    def _overload(self) -> None:
        options = self._options

        def take(count: int) -> list[Request]:
            texts = self._many_prompts.take(count, options.prompt_tokens)
            return [Request(text, (), options.max_tokens) for text in texts]

        streams, seconds = max(options.streams), options.overload_seconds
        self._overloads.append(overload.measure(self._url, self._wire, take, streams, seconds))
