"""What the next step computes: admission, turns, chunks, preemption. Plain Python, no torch.

Running sequences come first, oldest first: one token for each that decodes, one chunk for each that still reads
its prompt, as far as the step's prefill budget goes. What is left of it admits waiting ones. Chunk borders are
multiples of `chunk_size`, whatever the load. Where they may be anywhere, they are where the budget ends, and that
goes by what prompts were seen to cost (`prompt_room`).

Fairness: projects take turns, and the adapter sets of each (`waiting_queues`). A set whose turn it is but for
which there is no room yet may be passed over, at most `max_bypass` times; then nothing else is admitted before it,
but for projects with nothing running. It is tried again only when something has been freed. When blocks run out
the youngest running sequence is preempted: it gives everything back and is computed anew, from what the prefix
cache still has.

A project with nothing running doesn't wait for others' long answers: the youngest of the project that runs most is
preempted for its first sequence. That one is then the oldest of its project, and those are never preempted so;
only older sequences that need blocks may still take its place. So there are no more such preemptions than
sequences and preemptions for blocks.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Self

from adapters.errors import SmoloraError
from server.engine.kv_cache import BlockManager
from server.engine.sequence import Chunk, Sequence, Status
from server.engine.waiting_queues import Turn, WaitingQueues
from server.engine.waiting_set import Adapters, WaitingSet
from server.engine.watching.prompt_room import PromptRoom


@dataclass(frozen=True)
class SchedulerLimits:
    """How much one step does."""

    max_num_seqs: int = 32
    chunk_size: int = 64  # tokens of one prompt, at most, in one step
    max_prefill_tokens: int = 512  # of all prompts, in a step without decodes
    max_bypass: int = 32  # admissions past a set that waits for room

    @classmethod
    def on(cls, device_type: str, max_num_seqs: int = 32) -> Self:
        """The defaults suit "cpu"; on "cuda" eight times as much takes hardly longer."""
        if device_type == "cpu":
            return cls(max_num_seqs)
        return cls(max_num_seqs, chunk_size=512, max_prefill_tokens=4096)


@dataclass(frozen=True, eq=False)
class Failed:
    """A waiting sequence whose adapters can't be had; it has left the scheduler."""

    sequence: Sequence
    error: SmoloraError


@dataclass(frozen=True)
class Step:
    """One step's work. Empty where everything waits for adapters to load."""

    chunks: tuple[Chunk, ...]
    failed: tuple[Failed, ...]


class _Verdict(Enum):
    """What became of an attempt to admit a waiting sequence."""

    ADMITTED = "admitted"
    WAITS = "waits"  # for a load, or for blocks that another is computing: this ends by itself
    NO_ROOM = "no room"  # for its adapters or its blocks: others must finish first
    FAILED = "failed"


class Scheduler:
    """Holds every sequence from `add` until `finish`, and decides who computes what."""

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        adapters: Adapters,
        clock: Callable[[], float],
        *,
        cuts_anywhere: bool = False,
    ) -> None:
        """`cuts_anywhere`: chunks may end anywhere, which makes no difference to what they are computed to."""
        self.limits = limits
        self.blocks = blocks
        self.num_preemptions = 0
        self.running: list[Sequence] = []  # in order of admission
        self._adapters = adapters
        self._clock = clock
        self._prompt_room = PromptRoom(limits.max_num_seqs) if cuts_anywhere else None
        self._waiting = WaitingQueues()

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
        """All that have not finished."""
        yield from self.running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. It must fit the cache alone: its prompt and all tokens that it may add."""
        self._waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back what it holds."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        self._give_back(sequence)
        sequence.status = Status.FINISHED

    def observe(self, chunks: Seq[Chunk], seconds: float) -> None:
        """A step of these chunks took so long."""
        if self._prompt_room is not None:
            self._prompt_room.observe(chunks, seconds)

    def schedule(self) -> Step:
        """The next step. Blocks for its tokens are in the sequences' block tables."""
        chunks: list[Chunk] = []
        budget = self._prefill_budget()
        num_preemptions = self.num_preemptions
        for sequence in list(self.running):
            if sequence.status is not Status.RUNNING:  # preempted for an older one
                continue
            if sequence.is_decoding:
                stop = sequence.num_tokens
            elif budget > 0:
                stop = self._chunk_stop(sequence, budget)
                budget -= stop - sequence.num_computed_tokens
            else:
                continue
            if self._make_room(sequence, stop):
                chunks.append(Chunk(sequence, sequence.num_computed_tokens, stop))
        failed: list[Failed] = []
        if self._waiting and self.num_preemptions == num_preemptions:
            self._admit(chunks, failed, budget)
        return Step(tuple(chunks), tuple(failed))

    def _prefill_budget(self) -> int:
        """Prompt tokens of this step: few beside few decodes, whose next token waits for the whole step."""
        num_decodes = sum(1 for sequence in self.running if sequence.is_decoding)
        if not num_decodes:
            return self.limits.max_prefill_tokens
        if self._prompt_room is not None:
            return min(self._prompt_room.beside(num_decodes), self.limits.max_prefill_tokens)
        return min(max(self.limits.chunk_size, 4 * num_decodes), self.limits.max_prefill_tokens)

    def _chunk_stop(self, sequence: Sequence, budget: int) -> int:
        if self._prompt_room is not None:
            return min(sequence.num_computed_tokens + budget, sequence.num_tokens)
        size = self.limits.chunk_size
        return min((sequence.num_computed_tokens // size + 1) * size, sequence.num_tokens)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Reserve blocks up to `num_tokens`, preempting from the youngest on; False where that is itself."""
        while not self.blocks.reserve(sequence, num_tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.status = Status.WAITING
        self._waiting.put_back(sequence)
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.free(sequence)
        if sequence.hold is not None:
            sequence.hold.release()
            sequence.hold = None

    def _admit(self, chunks: list[Chunk], failed: list[Failed], budget: int) -> None:
        """Admit waiting sequences, a set at a time in turn, while the step has room for their first chunk."""
        num_running = Counter(sequence.request.project for sequence in self.running)
        turn = self._waiting.turn(num_running)
        if budget > 0:
            self._make_place(turn, num_running, chunks)
        lacking_room: list[WaitingSet] = []
        while budget > 0 and len(self.running) < self.limits.max_num_seqs and (queue := turn.first) is not None:
            sequence = queue.first
            match self._try_admit(queue):
                case _Verdict.ADMITTED:
                    turn.take_first()
                    queue.num_bypassed = 0
                    for other in lacking_room:
                        other.num_bypassed += 1
                    chunk = self._first_chunk(sequence, budget)
                    budget -= chunk.stop - chunk.start
                    chunks.append(chunk)
                case _Verdict.NO_ROOM:
                    if queue.num_bypassed < self.limits.max_bypass:
                        lacking_room.append(queue)
                        turn.pass_over()
                    elif not self._give_way(sequence):
                        return
                    # else it is tried again at once: if nothing runs, no later step would come by itself
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
        """Preempt a sequence, and drop its chunk, if a project with nothing running can begin by that alone."""
        starved = [queue for queue in islice(turn, self.limits.max_num_seqs) if not num_running[queue.project]]
        most = max(num_running.values(), default=0)
        if not starved or most < 2:
            return
        victim = next(s for s in reversed(self.running) if num_running[s.request.project] == most)
        num_free = self.blocks.num_free_blocks - self._num_promised_blocks(self.running)
        num_more = self.blocks.num_own_blocks(victim) + self._num_promised_blocks([victim])
        for queue in starved:
            if (queue.first.hold or queue.advance(self._adapters)).ready:
                # None of its project runs, so whatever it finds in the prefix cache comes out of the free blocks.
                num_needed = self.blocks.blocks_for(queue.first.num_needed_tokens)
                if num_needed <= num_free and len(self.running) < self.limits.max_num_seqs:
                    return
                if num_needed <= num_free + num_more:
                    self._preempt(victim)
                    chunks[:] = [chunk for chunk in chunks if chunk.sequence is not victim]
                    return
            if queue.num_bypassed >= self.limits.max_bypass:  # nothing may be admitted before it
                return

    def _try_admit(self, queue: WaitingSet) -> "_Verdict":
        if queue.lacks_room:
            return _Verdict.NO_ROOM
        sequence, hold = queue.first, queue.advance(self._adapters)
        if not hold.ready:
            if hold.error is not None:
                return _Verdict.FAILED
            return _Verdict.NO_ROOM if hold.lacks_room else _Verdict.WAITS
        if self.blocks.is_being_computed(sequence):
            return _Verdict.WAITS
        if not self.blocks.admit(sequence, num_spare_blocks=self._num_promised_blocks(self.running)):
            queue.lacks(self.blocks, self.blocks.num_freed)
            return _Verdict.NO_ROOM
        if sequence.admitted_at is None:
            sequence.admitted_at = self._clock()
            sequence.num_cached_tokens = sequence.num_computed_tokens
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        return _Verdict.ADMITTED

    def _num_promised_blocks(self, running: list[Sequence]) -> int:
        """What running sequences still need for the tokens that they have, and one more block each to grow."""
        blocks = self.blocks
        return sum(max(1, blocks.blocks_for(s.num_needed_tokens) - len(s.block_table)) for s in running)

    def _first_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        stop = self._chunk_stop(sequence, budget)
        reserved = self.blocks.reserve(sequence, stop)
        assert reserved, "an admitted sequence has room for its tokens"
        return Chunk(sequence, sequence.num_computed_tokens, stop)

    def _give_way(self, sequence: Sequence) -> bool:
        """Let go of adapters that others hold while they wait, which the sequence may need; whether any did."""
        holds = []
        for other in self._waiting:
            if other is not sequence and other.hold is not None and other.hold.is_held:
                holds.append(other.hold)
                other.hold = None
        for hold in holds:
            hold.release()
        return bool(holds)

    def _look_ahead(self, turn: Turn) -> None:
        """Have the adapters of the next sets read while others run, as many as could run at once."""
        for queue in islice(turn, self.limits.max_num_seqs):
            if not queue.lacks_room:
                queue.advance(self._adapters)
