"""The rounds: each measures everything once, server and peer in turn, with prompts that nobody has seen.

Who goes first changes from load to load and from round to round, so that a machine that gets slower or faster
favours nobody. While one works, the other waits for a message and takes no time.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.adapter_files import Sizes
from benchmarks.load import Request, drive, interfere, summarize
from benchmarks.measure import Figures, Run, percentile
from benchmarks.options import Options
from benchmarks.peers import Peer
from benchmarks.prompts import PromptSource
from benchmarks.results import BASE, BLENDS, ONE, Cold, FirstToken, Load, LongPrompts, Results, Row
from benchmarks.server_process import Server

SAME_START = 20
"""Characters that make a beginning."""


class Rounds:
    """`directories` holds the adapters of the loads, then those that are to be cold."""

    def __init__(
        self,
        options: Options,
        sizes: Sizes,
        prompts: PromptSource,
        directories: Sequence[Path],
        server: Server,
        peer: Peer | None,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._sizes = sizes
        self._prompts = prompts
        self._names = [f"adapter-{index}" for index in range(options.num_adapters)]
        self._warm = directories[: options.num_adapters]
        self._cold = list(directories[options.num_adapters :])
        self._server = server
        self._peer = peer
        self._say = say
        self._ours: dict[Load, list[Figures]] = defaultdict(list)
        self._theirs: dict[Load, list[Figures]] = defaultdict(list)
        self._cached: dict[Load, int] = defaultdict(int)
        self._same: dict[Load, list[bool]] = defaultdict(list)
        self._first: tuple[list[float], list[float]] = ([], [])
        self._cold_seconds: tuple[list[float], list[float], list[float], list[float]] = ([], [], [], [])
        self._gaps: tuple[list[float], list[float], list[float], list[float]] = ([], [], [], [])

    def run(self, results: Results) -> None:
        """All of it; what was measured is put into `results`."""
        options = self._options
        self._warm_up()
        for number in range(options.rounds):
            for index, load in enumerate(options.loads):
                self._say(f"round {number + 1} of {options.rounds}: {load.title}")
                self._load(load, peer_first=(number + index) % 2 == 1)
            if options.wants("ttft"):
                self._say(f"round {number + 1}: time to first token")
                self._first_tokens(peer_first=number % 2 == 1)
            if options.wants("cold"):
                self._say(f"round {number + 1}: cold adapters")
                for _ in range(options.cold):
                    self._cold_adapter()
            if options.wants("long"):
                self._say(f"round {number + 1}: long prompts while others run")
                self._long_prompts()
        results.rows = [self._row(load) for load in options.loads]
        if options.wants("ttft"):
            results.first_token = FirstToken(*map(tuple, self._first))
        if options.wants("cold"):
            results.cold = Cold(*map(tuple, self._cold_seconds))
        if options.wants("long"):
            results.long_prompts = LongPrompts(
                options.long_streams, self._long_tokens, options.long_every, *map(tuple, self._gaps)
            )

    def _warm_up(self) -> None:
        """Every adapter is resident and every kernel has run before anything counts."""
        self._say("uploading and loading adapters")
        for name, directory in zip(self._names, self._warm, strict=True):
            self._server.upload(name, directory)
            if self._peer is not None:
                self._peer.load_adapter(name, directory, keep=True)
        for index, directory in enumerate(self._cold):
            self._server.upload(f"cold-{index}", directory)
        texts = self._take(max(self._options.streams))
        drive(self._server.url, [[Request(text, None, 4)] for text in texts])
        drive(self._server.url, [[Request(text, name, 4)] for text, name in zip(texts, self._names, strict=False)])
        if self._peer is not None:
            for batch in ([texts[0]], texts):
                self._peer.generate([batch], None, 4)
                self._peer.generate([batch], self._names[0], 4)

    def _load(self, load: Load, *, peer_first: bool) -> None:
        batches = [self._take(load.streams) for _ in range(self._options.requests_of(load.streams))]
        adapters = self._expressions(load)
        ours: Run | None = None
        theirs: Run | None = None
        for is_peer in (True, False) if peer_first else (False, True):
            if not is_peer:
                answers = drive(
                    self._server.url,
                    [
                        [Request(batch[stream], adapters[stream], self._options.max_tokens) for batch in batches]
                        for stream in range(load.streams)
                    ],
                )
                ours = summarize(answers)
                self._cached[load] += sum(answer.num_cached_tokens for answer in answers)
            elif self._peer is not None and load.kind != BLENDS:
                named = [name for name in adapters if name is not None]
                together = None if load.kind == BASE else named[0] if load.kind == ONE else named
                theirs = self._peer.generate(batches, together, self._options.max_tokens)
        assert ours is not None
        self._ours[load].append(Figures.of(ours))
        if theirs is not None:
            self._theirs[load].append(Figures.of(theirs))
            # our answers come stream by stream, theirs batch by batch
            by_batch = [ours.texts[index :: len(batches)] for index in range(len(batches))]
            pairs = zip((text for batch in by_batch for text in batch), theirs.texts, strict=True)
            self._same[load] += [our[:SAME_START] == their[:SAME_START] for our, their in pairs]

    def _first_tokens(self, *, peer_first: bool) -> None:
        texts = self._take(self._options.first_tokens)
        for is_peer in (True, False) if peer_first else (False, True):
            for text in texts:
                if not is_peer:
                    self._first[0].append(drive(self._server.url, [[Request(text, None, 1)]])[0].first_token)
                elif self._peer is not None:
                    self._first[1].append(self._peer.generate([[text]], None, 1).first_token[0])

    def _cold_adapter(self) -> None:
        """One adapter, for the first time; the same when it is there; and as PEFT loads it."""
        index = len(self._cold_seconds[0])
        first, second = self._take(2)
        url, adapter = self._server.url, f"cold-{index}"
        cold = drive(url, [[Request(first, adapter, 1)]])[0]
        resident = drive(url, [[Request(second, adapter, 1)]])[0]
        self._cold_seconds[0].append(cold.first_token - resident.first_token)
        self._cold_seconds[1].append(cold.queue_seconds - resident.queue_seconds)
        if self._peer is not None:
            self._cold_seconds[2].append(self._peer.load_adapter(adapter, self._cold[index]))
            self._cold_seconds[3].append(self._peer.load_adapter(adapter, self._cold[index], low_memory=True))

    @property
    def _long_tokens(self) -> int:
        return min(self._options.long_tokens, self._sizes.max_positions // 2)

    def _long_prompts(self) -> None:
        options = self._options
        longest = min(self._sizes.max_positions, 8192) - options.prompt_tokens
        running = [Request(text, None, longest) for text in self._take(options.long_streams)]
        texts = self._prompts.take(options.long_prompts, self._long_tokens)
        quiet, disturbed = interfere(
            self._server.url, running, [Request(text, None, 1) for text in texts], options.long_every
        )
        figures = [percentile(gaps, percent) for gaps in (quiet, disturbed) for percent in (50, 99)]
        for values, figure in zip(self._gaps, figures, strict=True):
            values.append(figure)

    def _expressions(self, load: Load) -> list[str | None]:
        """An adapter expression for each stream."""
        if load.kind == BASE:
            return [None] * load.streams
        if load.kind == ONE:
            return [self._names[0]] * load.streams
        names = self._names
        if load.kind == BLENDS:
            return [f"{names[i]}*0.7+{names[(i + 1) % len(names)]}*0.3" for i in range(load.streams)]
        return list(names[: load.streams])

    def _row(self, load: Load) -> Row:
        same = self._same[load]
        return Row(
            load,
            tuple(self._ours[load]),
            tuple(self._theirs[load]),
            self._cached[load],
            sum(same) / len(same) if same else None,
        )

    def _take(self, count: int) -> list[str]:
        return self._prompts.take(count, self._options.prompt_tokens)
