"""Choose what the next step computes: admission, turns, chunks, preemption. Plain Python, no torch.

A step admits waiting sequences, decodes one token of each decoding sequence, and shares its prefill budget among
the prompts. Chunks end at multiples of `chunk_size`, whatever the load. If the backend allows chunks to end
anywhere, they end where the budget is used up, and the budget depends on the measured cost of prompts
(`cost_model`).

Prompts: while several projects send requests, steps with prompts take about `QUICK_STEP` at most, because a
project that begins has to wait for the current step. The oldest prompt gets at least half of the budget, so it
can't starve. The rest goes first to the project that has had the least engine time, and within a project first to
the prompts with the shortest remainders. So a short prompt doesn't wait for a long one.

Projects: engine time is shared equally (`shares`). A project that has had more than its share skips steps. The
waiting sequences of a project that use the same adapters form a waiting set (`waiting`). Waiting projects take
turns, and so do the waiting sets of each project. Projects with the fewest running sequences come first. If a
waiting set lacks a place in the batch, blocks or adapter memory (rank rows), and another project has more of this
resource, the youngest sequences of that project are preempted until there is room. A project's last sequence is
preempted only for a project with nothing running, whose engine time is behind by `shares.SLACK`. A preempted
sequence isn't preempted for another project again before it has made progress.

Room: a waiting set whose turn it is, but which lacks room, is passed over at most `max_bypass` times. Then nothing
else is admitted before it, except sequences of projects with nothing running. It is tried again only after
something was freed. When blocks run out, the youngest sequence of the project with the most blocks is preempted. A
preempted sequence frees everything, and is computed again from what the prefix cache still has.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Self

from adapters.errors import SmoloraError
from server.engine.adapter_pool import AdapterHold, AdapterPool
from server.engine.cost_model import PromptRoom
from server.engine.kv_cache import BlockManager
from server.engine.sequence import Chunk, Sequence, Status
from server.engine.shares import ProjectShares
from server.engine.waiting import Turn, WaitingQueues, WaitingSet

QUICK_STEP = 0.04
"""Seconds that a step with prompts may take while several projects send requests."""
_COMPANY_SECONDS = 60.0  # a project counts as sending requests for this long after its last one
_MAX_ROW_SHARE = 0.75
"""A project that holds more than this share of the rank rows may lose some to any project that needs rows."""


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits on the work of one step."""

    max_num_seqs: int = 32
    chunk_size: int = 64  # maximum tokens of one prompt in one step
    max_prefill_tokens: int = 512  # maximum tokens of all prompts in a step
    max_bypass: int = 32  # maximum number of admissions ahead of a set that waits for room
    prefill_share: float = 0.71  # share of a step's time that prompts may take while sequences decode

    @classmethod
    def on(cls, device_type: str, max_num_seqs: int = 32, prefill_share: float = prefill_share) -> Self:
        """Return the limits for a device type: a GPU may compute 8 times as many tokens in a step as a CPU."""
        if device_type == "cpu":
            return cls(max_num_seqs, prefill_share=prefill_share)
        return cls(max_num_seqs, chunk_size=512, max_prefill_tokens=4096, prefill_share=prefill_share)


@dataclass(frozen=True, eq=False)
class Failed:
    """A waiting sequence whose adapters can't be loaded. It has left the scheduler."""

    sequence: Sequence
    error: SmoloraError


@dataclass(frozen=True)
class Step:
    """The work of one step. It is empty if all sequences wait for adapters or masks."""

    chunks: tuple[Chunk, ...]
    failed: tuple[Failed, ...]


class _Verdict(Enum):
    """The result of an attempt to admit a waiting sequence."""

    ADMITTED = "admitted"
    WAITS = "waits"  # for a load, a mask, or blocks that another sequence computes; ends by itself
    NO_ROOM = "no room"  # for its adapters or its blocks; other sequences must free some
    FAILED = "failed"


class _Lack(Enum):
    """A resource that a waiting sequence lacks."""

    ROWS = "rank rows"
    BLOCKS = "blocks"
    PLACE = "a place in the batch"


class Scheduler:
    """Keeps all sequences from `add` until `finish`, and chooses each step's work."""

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        adapters: AdapterPool,
        clock: Callable[[], float],
        *,
        cuts_anywhere: bool = False,
    ) -> None:
        """If `cuts_anywhere`, the ends of chunks don't affect results, so chunks may end anywhere."""
        self.limits = limits
        self.blocks = blocks
        self.num_preemptions = 0
        self.running: list[Sequence] = []  # in order of admission
        self.at_work: Sequence | None = None  # the sequence that was being scheduled, if `schedule` raised
        self._adapters = adapters
        self._clock = clock
        self._prompt_room = PromptRoom(limits.max_num_seqs, limits.prefill_share) if cuts_anywhere else None
        self._waiting = WaitingQueues()
        self._shares = ProjectShares()
        self._seen: dict[str, float] = {}  # arrival of each project's last request, the latest one last

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_adapters(self) -> frozenset[str]:
        return self._waiting.digests()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._waiting)

    def sequences(self) -> Iterator[Sequence]:
        """Yield all unfinished sequences."""
        yield from self.running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Its prompt and longest answer must fit into the cache."""
        self._waiting.add(sequence)
        now, project = self._clock(), sequence.request.project
        self._seen.pop(project, None)
        self._seen = {p: at for p, at in self._seen.items() if now - at < _COMPANY_SECONDS} | {project: now}

    def finish(self, sequence: Sequence) -> None:
        """Remove a running or waiting sequence, and free its resources."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        self._give_back(sequence)
        sequence.status = Status.FINISHED

    def observe(self, chunks: Seq[Chunk], seconds: float, worked: float) -> None:
        """Learn from a step that took `seconds`, and charge the step's projects for the `worked` seconds.

        `worked` is processor time of the engine's thread, so projects don't pay for other delays of a step.
        """
        self._shares.charge(chunks, worked, self._num_running())
        if self._prompt_room is not None:
            self._prompt_room.observe(chunks, seconds)

    def schedule(self) -> Step:
        """Return the next step. The blocks for its tokens have been reserved."""
        failed: list[Failed] = []
        self.at_work = None
        num_preemptions = self.num_preemptions
        due = self._due()
        chunks = self._chunks({s: s.num_tokens for s in self._able(due) if s.is_decoding})
        if self._waiting and self.num_preemptions == num_preemptions:
            self._admit(chunks, failed, due)
            due = self._due()  # now with the projects that have begun
        chunks = [chunk for chunk in chunks if chunk.sequence.request.project in due]
        begun = {chunk.sequence for chunk in chunks}
        prompts = [sequence for sequence in self._able(due) if sequence not in begun]
        chunks += self._chunks(self._prefill_stops(prompts, len(chunks)))
        chunks = [chunk for chunk in chunks if chunk.sequence.status is Status.RUNNING]
        if not chunks:  # possibly all due sequences were preempted
            chunks = self._chunks(self._prefill_stops(self._able(self._num_running()), 0))
        if not self.has_work:
            self._shares.clear()
        order = {sequence: number for number, sequence in enumerate(self.running)}
        chunks.sort(key=lambda chunk: order[chunk.sequence])  # a request's first choice comes first
        return Step(tuple(chunks), tuple(failed))

    def _due(self) -> frozenset[str]:
        """Return the projects that take part in this step, out of those with something to compute."""
        return self._shares.due({s.request.project for s in self.running if not s.awaits_mask})

    def _able(self, projects: Collection[str]) -> list[Sequence]:
        """Return the running sequences of these projects, without sequences that wait for a mask."""
        return [s for s in self.running if s.request.project in projects and not s.awaits_mask]

    def _chunks(self, stops: Mapping[Sequence, int]) -> list[Chunk]:
        """Reserve the blocks of the sequences' chunks, and return the chunks.

        `stops` maps each sequence to the end of its chunk. Reserving blocks may preempt sequences, which get no
        chunk.
        """
        chunks = []
        for sequence, stop in stops.items():
            self.at_work = sequence
            if sequence.status is Status.RUNNING and self._make_room(sequence, stop):
                chunks.append(Chunk(sequence, sequence.num_computed_tokens, stop))
        self.at_work = None
        return [chunk for chunk in chunks if chunk.sequence.status is Status.RUNNING]

    def _prefill_stops(self, prompts: Seq[Sequence], num_decodes: int) -> dict[Sequence, int]:
        """Share the step's token budget among prompts, and return the end of each prompt's chunk.

        The oldest prompt gets at least half. The rest goes first to the projects with the least engine time, and
        within a project first to the prompts with the fewest remaining tokens.
        """
        if not prompts:
            return {}
        oldest, *others = prompts
        budget = self._prefill_budget(num_decodes)
        num_reserved = self._num_reserved(oldest, budget) if others else 0
        stops: dict[Sequence, int] = {}
        for sequence in sorted(others, key=lambda s: (self._shares.used(s.request.project), self._remainder(s))):
            if budget > num_reserved:
                stops[sequence] = self._chunk_stop(sequence, budget - num_reserved)
                budget -= stops[sequence] - sequence.num_computed_tokens
        stops[oldest] = self._chunk_stop(oldest, budget)
        return stops

    def _num_reserved(self, oldest: Sequence, budget: int) -> int:
        """Return how many tokens of the budget are reserved for the oldest prompt."""
        return min(self._remainder(oldest), (budget + 1) // 2)

    @staticmethod
    def _remainder(sequence: Sequence) -> int:
        """Return how many of a sequence's tokens are still to be computed."""
        return sequence.num_tokens - sequence.num_computed_tokens

    def _num_running(self) -> Counter[str]:
        """Count the running sequences by project."""
        return Counter(sequence.request.project for sequence in self.running)

    def _prefill_budget(self, num_decodes: int) -> int:
        """Return the maximum number of prompt tokens in a step that also computes `num_decodes` decodes."""
        room, most = self._prompt_room, self.limits.max_prefill_tokens
        if len(self._seen) > 1:
            most = min(most, self.limits.chunk_size if room is None else room.within(QUICK_STEP, num_decodes))
        if not num_decodes:
            return most
        return min(
            max(self.limits.chunk_size, 4 * num_decodes) if room is None else room.with_decodes(num_decodes), most
        )

    def _chunk_stop(self, sequence: Sequence, budget: int) -> int:
        if self._prompt_room is not None:
            return min(sequence.num_computed_tokens + budget, sequence.num_tokens)
        size = self.limits.chunk_size
        return min((sequence.num_computed_tokens // size + 1) * size, sequence.num_tokens)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Reserve blocks for `num_tokens` tokens, if necessary by preempting sequences.

        Return False if `sequence` itself was preempted.
        """
        while not self.blocks.reserve(sequence, num_tokens):
            victim = self._victim_for_blocks()
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _victim_for_blocks(self) -> Sequence:
        """Return the youngest sequence of the project with the most blocks.

        Projects with a single running sequence are spared if possible. The oldest sequence is never chosen while
        another sequence runs, so some sequence always makes progress.
        """
        num_running, num_blocks = self._num_running(), self._num_blocks()
        several = [project for project, num in num_running.items() if num > 1]
        if len(num_running) == 1 or not several:
            return self.running[-1]
        most = max(several, key=lambda project: num_blocks[project])
        return next(s for s in reversed(self.running) if s.request.project == most)

    def _num_blocks(self) -> Counter[str]:
        """Count the blocks in use by project. A block that two sequences share counts twice."""
        num: Counter[str] = Counter()
        for sequence in self.running:
            num[sequence.request.project] += len(sequence.block_table)
        return num

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.num_lost_tokens = max(sequence.num_lost_tokens, sequence.num_computed_tokens)
        self._give_back(sequence)
        sequence.status = Status.WAITING
        self._waiting.put_back(sequence)
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        if sequence.hold is not None:
            sequence.hold.release()
            sequence.hold = None

    def _admit(self, chunks: list[Chunk], failed: list[Failed], due: Collection[str]) -> None:
        """Admit waiting sequences while the step has room for their prompts. Projects and adapter sets take turns.

        A project that has something to compute but isn't `due` skips this step, and nothing is admitted for it.
        Sequences may be preempted for other projects; the preempted sequences' chunks are removed from `chunks`.
        Sequences whose adapters can't be loaded are appended to `failed`.
        """
        num_running = self._num_running()
        resting = {s.request.project for s in self._able(num_running)} - set(due)
        turn = self._waiting.turn(num_running, lambda project: project not in resting)
        if num_running and (queue := turn.first) is not None and not num_running[queue.project]:
            queue.hurry(self._adapters)  # otherwise each stage of a load would wait for a step of the others
        self._make_place(turn, num_running, chunks)
        able = self._able(due)
        prompts = [sequence for sequence in able if not sequence.is_decoding]
        budget = self._prefill_budget(len(able) - len(prompts))
        if prompts:
            budget -= self._num_reserved(prompts[0], budget)
        remainders = [self._remainder(sequence) for sequence in prompts[1:]]
        lacking_room: list[WaitingSet] = []
        while len(self.running) < self.limits.max_num_seqs and (queue := turn.first) is not None:
            sequence = queue.first
            begins = not num_running[queue.project]  # then the other projects sit out until this one has caught up
            if not begins and sum(num for num in remainders if num <= sequence.num_tokens) >= budget:
                break  # in the batch it would wait, too, for shorter prompts
            self.at_work = sequence
            verdict = self._try_admit(queue)
            self.at_work = None
            match verdict:
                case _Verdict.ADMITTED:
                    turn.take_first()
                    num_running[queue.project] += 1
                    queue.num_bypassed = 0
                    for other in lacking_room:
                        other.num_bypassed += 1
                    remainders.append(self._remainder(sequence))
                case _Verdict.NO_ROOM:
                    if queue.num_bypassed < self.limits.max_bypass:
                        lacking_room.append(queue)
                        turn.pass_over()
                    elif not self._give_way(sequence):
                        return
                    # Otherwise try it again at once. If nothing runs, no later step would try it.
                case _Verdict.FAILED:
                    assert sequence.hold is not None
                    assert sequence.hold.error is not None
                    failed.append(Failed(sequence, sequence.hold.error))
                    self.finish(sequence)
                    turn.try_later()
                case _Verdict.WAITS:
                    turn.pass_over()
        self._look_ahead(turn)

    def _make_place(self, turn: Turn, num_running: Counter[str], chunks: list[Chunk]) -> None:
        """Preempt sequences so that a waiting sequence can begin.

        This is the first sequence in the order of `turn` for which it is possible. But if one before it lacks
        nothing, preempt none. The preempted sequences are of a project that has more of the lacking resource than
        the waiting sequence's project. Their chunks are removed from `chunks`.
        """
        if len(num_running) < 2 and all(queue.project in num_running for queue in islice(turn, 1)):
            return  # there is no other project
        num_free = self.blocks.num_free_blocks - self._num_promised_blocks(self.running)
        for queue in islice(turn, self.limits.max_num_seqs):
            hold = queue.first.hold or queue.advance(self._adapters)
            if hold.ready or hold.lacks_room:
                lacks = self._lacks(queue.first, hold, num_free)
                if lacks is None:
                    return
                if victims := self._victims(queue.first, hold, lacks, num_free, num_running):
                    for victim in victims:
                        if victim.status is Status.RUNNING:
                            self._preempt(victim)
                        else:
                            self._give_back(victim)
                    chunks[:] = [chunk for chunk in chunks if chunk.sequence not in victims]
                    queue.hurry(self._adapters)  # before others take the freed rows
                    return
            if queue.num_bypassed >= self.limits.max_bypass:  # nothing may be admitted before it
                return

    def _lacks(
        self, sequence: Sequence, hold: AdapterHold, num_free: int, without: Seq[Sequence] = ()
    ) -> "_Lack | None":
        """Return what a waiting sequence would lack if the sequences in `without` were preempted.

        Return None if the sequence could then begin. `num_free` is the number of blocks that are free and not
        promised to running sequences. The sequence's need includes the blocks that it could take from the prefix
        cache, because `num_free` includes them, too, while no other sequence uses them.
        """
        if hold.lacks_room and not self._adapters.fits(hold, [s.hold for s in without if s.hold is not None]):
            return _Lack.ROWS
        without = [victim for victim in without if victim.status is Status.RUNNING]
        num_free += sum(map(self.blocks.num_own_blocks, without)) + self._num_promised_blocks(without)
        if self.blocks.blocks_for(sequence.num_needed_tokens) > num_free:
            return _Lack.BLOCKS
        return _Lack.PLACE if len(self.running) - len(without) >= self.limits.max_num_seqs else None

    def _victims(
        self, sequence: Sequence, hold: AdapterHold, lacks: "_Lack", num_free: int, num_running: Counter[str]
    ) -> list[Sequence]:
        """Return the sequences to preempt so that the waiting `sequence` gets the resource that it `lacks`.

        Let P be the project with the most of this resource, apart from the project of `sequence`. The result has
        the youngest sequences of P, and before these any waiting sequences of P whose adapters have memory.

        Return an empty list if `sequence` still couldn't begin. Also return an empty list if its project would
        then have at least as much of the resource as P has now. An exception is a project with nothing running
        whose engine time is behind by `shares.SLACK`.
        """
        project = sequence.request.project
        others = [other for other in num_running if other != project]
        if not others:
            return []
        if lacks is _Lack.ROWS:
            of = {other: self._row_share(other) for other in others}
            own = min(self._row_share(project, hold), _MAX_ROW_SHARE)
        elif lacks is _Lack.BLOCKS:
            num_blocks = self._num_blocks()
            of = {p: num_blocks[p] for p in others}
            own = num_blocks[project] + self.blocks.blocks_for(sequence.num_needed_tokens)
        else:
            of, own = {p: num_running[p] for p in others}, num_running[project] + 1
        starves = not num_running[project]
        if starves:
            self._shares.enter(project)
        most = max(others, key=lambda other: (of[other], self._shares.lead(other, project)))
        takes_last = starves and self._shares.is_ahead(most, project)
        if of[most] <= own and not takes_last:
            return []
        victims: list[Sequence] = []
        candidates = [s for s in reversed(self.running) if s.request.project == most]
        for victim in [*self._waiting_with_rows(most), *(candidates if takes_last else candidates[:-1])]:
            is_waiting, num_lost = victim.status is Status.WAITING, victim.num_lost_tokens
            if is_waiting or not num_lost or victim.num_computed_tokens > num_lost:
                victims.append(victim)
                if self._lacks(sequence, hold, num_free, victims) is None:
                    break
        else:
            return []
        for victim in victims.copy():  # spare the victims that aren't needed, such as one without adapters
            rest = [other for other in victims if other is not victim]
            if self._lacks(sequence, hold, num_free, rest) is None:
                victims = rest
        return victims

    def _row_share(self, project: str, *more: AdapterHold) -> float:
        """Return the share of adapter memory that the adapters of a project's sequences and of `more` take."""
        running = [sequence for sequence in self.running if sequence.request.project == project]
        holders = [*running, *self._waiting_with_rows(project)]
        return self._adapters.share([*(s.hold for s in holders if s.hold is not None), *more])

    def _waiting_with_rows(self, project: str) -> list[Sequence]:
        sequences = (sequence for queue in self._waiting.sets(project) for sequence in queue.sequences)
        return [s for s in sequences if s.request.adapters and s.hold is not None and s.hold.is_held]

    def _try_admit(self, queue: WaitingSet) -> "_Verdict":
        if queue.lacks_room:
            return _Verdict.NO_ROOM
        sequence, hold = queue.first, queue.advance(self._adapters)
        if not hold.ready:
            if hold.error is not None:
                return _Verdict.FAILED
            return _Verdict.NO_ROOM if hold.lacks_room else _Verdict.WAITS
        if sequence.awaits_mask or self.blocks.is_being_computed(sequence):
            return _Verdict.WAITS
        if not self.blocks.admit(sequence, num_spare_blocks=self._num_promised_blocks(self.running)):
            queue.lacks(self.blocks, self.blocks.num_freed)
            return _Verdict.NO_ROOM
        if sequence.admitted_at is None:
            sequence.admitted_at = self._clock()
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.status = Status.RUNNING
        if all(other.request.project != sequence.request.project for other in self.running):
            self._shares.enter(sequence.request.project)
        self.running.append(sequence)
        return _Verdict.ADMITTED

    def _num_promised_blocks(self, running: Iterable[Sequence]) -> int:
        """Return how many blocks the running sequences still need: at least one for each, since each grows."""
        blocks = self.blocks
        return sum(max(1, blocks.blocks_for(s.num_needed_tokens) - len(s.block_table)) for s in running)

    def _give_way(self, sequence: Sequence) -> bool:
        """Let the adapters that are kept in memory for other waiting sequences be evicted.

        Return whether there were any.
        """
        holds = []
        for other in self._waiting:
            if other is not sequence and other.hold is not None and other.hold.is_held:
                holds.append(other.hold)
                other.hold = None
        for hold in holds:
            hold.release()
        return bool(holds)

    def _look_ahead(self, turn: Turn) -> None:
        """Begin to load the adapters of the next waiting sequences in `turn`, as many as can run at once."""
        for queue in islice(turn, self.limits.max_num_seqs):
            if not queue.lacks_room:
                queue.advance(self._adapters)
