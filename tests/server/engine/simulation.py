"""Simulate the scheduler without a model: growing sequences, blocks with content, and adapter loads.

Every step checks the invariants: the owners of blocks, that each sequence reads only what it would have computed
itself, that only sequences with ready adapters run, and that an empty step means that a load is in progress, whose
end will wake the engine.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from adapters.lora import AdapterRef
from server.engine.adapter_pool import AdapterPool
from server.engine.kv_cache import BlockManager
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import Scheduler, SchedulerLimits, Step
from server.engine.sequence import Chunk, Sequence, Status
from server.engine.speculation import Speculator
from tests.server.engine.speculation.drafting import SetCosts

Content = tuple[bytes, tuple[int, ...]]


@dataclass(eq=False)
class Simulation:
    """A scheduler and a simulated model. `is_loading` says whether something will wake a sleeping engine."""

    limits: SchedulerLimits
    blocks: BlockManager
    adapters: AdapterPool
    is_loading: Callable[[], bool]
    rng: random.Random
    on_step: Callable[[], None] = lambda: None
    step_seconds: Callable[[int], float] | None = None  # duration of a step with this many tokens
    drafts: bool = False  # with drafts, chunks may end anywhere: rows of a step don't affect each other
    max_total: int = 0  # number of tokens that fit the cache
    num_steps: int = 0
    seconds: float = 0.0  # by `step_seconds`
    num_accepted: int = 0  # drafted tokens that were drawn
    finished: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    admissions: list[Sequence] = field(default_factory=list)
    displaced: list[Sequence] = field(default_factory=list)  # preempted for a project that had nothing running
    _content: dict[tuple[int, int], Content] = field(default_factory=dict)
    _num_requests: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.limits, self.blocks, self.adapters, lambda: float(self.num_steps), cuts_anywhere=self.drafts
        )
        self.max_total = self.blocks.num_usable_blocks * self.blocks.block_size
        self.speculator = Speculator(self.blocks, [], self.limits.max_num_seqs, is_on=self.drafts)
        self.speculator.costs = SetCosts(0.0)

    def add(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        adapters: tuple[str, ...] = (),
        n: int = 1,
        project: str = "",
    ) -> list[Sequence]:
        """Add a request that `Engine.check` would accept, with a prompt cut to fit."""
        max_tokens = min(max_tokens, self.max_total - 1)
        prompt = prompt[: self.max_total - max_tokens]
        self._num_requests += 1
        request = GenerationRequest(
            str(self._num_requests),
            prompt,
            SamplingParams(max_tokens=max_tokens),
            tuple(AdapterRef(digest) for digest in sorted(set(adapters))),
            n,
            project=project,
        )
        new = [Sequence(request, i, float(self.num_steps), self.blocks.block_size) for i in range(n)]
        for sequence in new:
            self.scheduler.add(sequence)
        return new

    def live(self) -> list[Sequence]:
        return list(self.scheduler.sequences())

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.check()

    def step(self, *, crash: bool = False) -> Step:
        """Run one step. With `crash` the model fails, and all sequences of the step end."""
        before = list(self.scheduler.running)
        step = self.scheduler.schedule()
        self.num_steps += 1
        admitted = [s for s in self.scheduler.running if s not in before]
        self.admissions += admitted
        self._check_displaced(before, admitted)
        self.failed += [failed.sequence for failed in step.failed]
        self._check_step(step, before)
        if self.step_seconds is not None and step.chunks:
            seconds = self.step_seconds(sum(chunk.num_tokens for chunk in step.chunks))
            self.scheduler.observe(step.chunks, seconds, seconds)
            self.seconds += seconds
        for chunk in self.speculator.extend(step.chunks):
            if crash:
                self._finish(chunk.sequence, self.failed)
            else:
                self._compute(chunk)
        self.on_step()
        self.check()
        return step

    def drain(self, max_steps: int) -> None:
        """Step until everything has ended, at most `max_steps` times."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"{len(self.live())} sequences have not ended after {max_steps} steps"
        self.blocks.check([])
        assert not self.blocks._computing

    def bound(self) -> int:
        """Return a number of steps that any fair schedule of the live sequences stays below."""
        return 100 + 20 * sum(s.num_prompt_tokens + s.request.sampling.max_tokens + 10 for s in self.live())

    def _compute(self, chunk: Chunk) -> None:
        """Write the tokens and the draft, and draw tokens while they match the draft."""
        sequence = chunk.sequence
        for i in range(chunk.num_tokens):
            block, place = self._place(sequence, chunk.start + i)
            assert self.blocks._references[block] == 1, "a shared block is written"
            known = (*sequence.token_ids[: chunk.start], *chunk.token_ids[: i + 1])
            self._content[block, place] = sequence.prefix_root, known
        sequence.num_computed_tokens = chunk.stop
        self.blocks.mark_computed(sequence)
        if not chunk.samples:
            return
        for guess in (*chunk.draft, None):
            sequence.token_ids.append(self.rng.randrange(2))
            if sequence.num_output_tokens == sequence.request.sampling.max_tokens:
                self._finish(sequence, self.finished)
                return
            if sequence.token_ids[-1] != guess:
                break
            self.num_accepted += 1
            sequence.num_computed_tokens += 1
            self.blocks.mark_computed(sequence)
        self.blocks.trim(sequence)

    def _finish(self, sequence: Sequence, ended: list[Sequence]) -> None:
        self.scheduler.finish(sequence)
        self.speculator.forget(sequence)
        ended.append(sequence)

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.blocks.block_size], position % self.blocks.block_size

    def _truth(self, sequence: Sequence, position: int) -> Content:
        return sequence.prefix_root, tuple(sequence.token_ids[: position + 1])

    def _check_displaced(self, before: list[Sequence], admitted: list[Sequence]) -> None:
        """Whoever is preempted for blocks leaves no step in which others are admitted: this was for a project."""
        preempted = [s for s in before if s.status is Status.WAITING]
        if not preempted or not admitted:
            return
        assert len({victim.request.project for victim in preempted}) == 1
        self.displaced += preempted

    def _check_step(self, step: Step, before: list[Sequence]) -> None:
        scheduler, limits = self.scheduler, self.limits
        assert len(scheduler.running) <= limits.max_num_seqs
        scheduled = [chunk.sequence for chunk in step.chunks]
        assert len(set(scheduled)) == len(scheduled)
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert sequence.status is Status.RUNNING
            assert sequence.hold is not None
            assert sequence.hold.ready, "a sequence runs before its adapters are there"
            assert chunk.start == sequence.num_computed_tokens < chunk.stop <= sequence.num_tokens
            if not self.drafts:
                assert chunk.stop == sequence.num_tokens or chunk.stop % limits.chunk_size == 0
                assert chunk.stop - chunk.start <= limits.chunk_size
            assert len(sequence.block_table) * self.blocks.block_size >= chunk.stop
            for position in range(chunk.start):
                read = self._content[self._place(sequence, position)]
                assert read == self._truth(sequence, position), "it reads another's keys and values"
        decoding = [s for s in scheduler.running if s.is_decoding and s in before]
        if self.step_seconds is None:  # else projects that have had their share sit out
            assert set(decoding) <= set(scheduled), "a running sequence missed a step"
        prefilled = sum(c.stop - c.start for c in step.chunks if c.sequence not in decoding)
        if self.drafts:
            assert prefilled <= limits.max_prefill_tokens
        else:
            assert prefilled < limits.max_prefill_tokens + 2 * limits.chunk_size
        if not step.chunks and not step.failed:
            assert not scheduler.running, "running sequences, and nothing to do"
            assert not scheduler.has_work or self.is_loading(), "the engine would sleep for ever"

    def check(self) -> None:
        """Check which sequence has which blocks now."""
        running = self.scheduler.running
        self.blocks.check(running)
        waiting = [s for s in self.live() if s not in running]
        assert all(s.status is Status.WAITING and not s.block_table for s in waiting)
        assert len(waiting) == self.scheduler.num_waiting
        assert all(any(owner is s for s in running) for owner in self.blocks._computing.values())
        assert all(s.hold is None and not s.block_table for s in (*self.finished, *self.failed))
