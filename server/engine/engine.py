"""The core loop, which schedules, runs and postprocesses one step at a time.

One thread owns an engine. `async_engine` connects this thread to others. The engine identifies adapters by digest,
and reads them with an injected `load`. It identifies tokens by id, and converts them to text with an injected
`TokenBytes`. A failed step ends the sequences in the step. After several failures in a row the engine is dead
(`is_dead`).
"""

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from adapters.errors import InvalidInput, SmoloraError
from server.engine.adapter_pool import NUM_READERS, AdapterPool, Load, started
from server.engine.backend import Backend
from server.engine.detokenizer import TextStream, TokenBytes
from server.engine.guidance import Guidance
from server.engine.kv_cache import BlockManager
from server.engine.masks import Masks
from server.engine.request import EngineStats, FinishReason, GenerationRequest, SampledLogprob, SequenceOutput
from server.engine.runner import Drawn, Runner
from server.engine.sampling import Sampled
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import Chunk, Sequence, Status
from server.engine.speculation import Speculator
from server.errors import EngineDead, GenerationFailed, NotReady

log = logging.getLogger(__name__)

_MAX_FAILURES = 3  # steps that fail in a row before the engine is dead
_STEP_FAILED = "the engine failed in a step of this request; try it again"


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits. Sizes in bytes are of device memory."""

    max_model_len: int  # tokens of a prompt and its answer together
    kv_cache_bytes: int
    adapter_cache_bytes: int
    block_size: int = 16
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)


class Engine:
    """The core loop with its queues, caches and counters. It generates for many requests at once."""

    def __init__(
        self,
        backend: Backend,
        token_bytes: TokenBytes,
        load: Load,
        config: EngineConfig,
        *,
        guidance: Guidance | None = None,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Allocate the backend's memory, and start the threads that load adapters.

        These threads read an adapter with `load(digest)`. Other threads call `wake` when a load has progressed,
        and when a mask that a sequence waits for is ready: a mask says which tokens a grammar allows next.
        Requests with a grammar need a `guidance` that has checked the grammar.
        """
        block_bytes = backend.bytes_per_block(config.block_size)
        num_blocks = config.kv_cache_bytes // block_bytes + 1  # one more for padding
        self.config = config
        self.blocks = BlockManager(max(num_blocks, 2), config.block_size)
        self._eos = frozenset(backend.config.eos_token_ids)
        self._vocab_size = backend.config.vocab_size
        self._token_bytes = token_bytes
        self._guidance = guidance
        self._masks = None if guidance is None else Masks(self._vocab_size, wake)
        self._clock = clock
        max_rank = max(config.adapter_cache_bytes // backend.bytes_per_rank, 1)
        backend.allocate(self.blocks.num_blocks, config.block_size, max_rank)
        self._loaders = started(NUM_READERS, "adapter-reader"), started(2, "adapter-placer")
        self.pool = AdapterPool(backend.rows, load, *self._loaders, wake, clock)
        num_seqs = config.scheduler.max_num_seqs
        is_invariant = backend.is_batch_invariant
        self.scheduler = Scheduler(config.scheduler, self.blocks, self.pool, clock, cuts_anywhere=is_invariant)
        self.runner = Runner(backend)
        self.speculator = Speculator(self.blocks, self._eos, num_seqs, is_on=is_invariant)
        self._streams: dict[Sequence, TextStream] = {}
        self._requests: dict[str, list[Sequence]] = {}  # unfinished sequences by request id
        self.num_failures = 0  # failed steps since the last successful one
        self.num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_prefix_tokens = 0
        self._num_accepted_tokens = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def max_num_tokens(self) -> int:
        """The most tokens that one sequence can have: its prompt and its answer."""
        return min(self.config.max_model_len, self.blocks.num_usable_blocks * self.config.block_size)

    @property
    def is_dead(self) -> bool:
        """Whether the engine can't continue, because several steps failed in a row."""
        return self.num_failures >= _MAX_FAILURES

    @property
    def stats(self) -> EngineStats:
        resident = self.pool.resident
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            kv_blocks_total=self.blocks.num_usable_blocks,
            kv_blocks_used=self.blocks.num_used_blocks,
            adapters_resident=len(resident),
            adapter_rows_total=self.pool.num_rows,
            adapter_rows_used=self.pool.num_rows_used,
            max_adapter_rank=self.pool.rows.max_rank,
            adapter_loads=self.pool.num_loads,
            adapter_evictions=self.pool.num_evictions,
            prefix_cached_tokens=self._num_prefix_tokens,
            prompt_tokens=self._num_prompt_tokens,
            output_tokens=self._num_output_tokens,
            preemptions=self.scheduler.num_preemptions,
            steps=self.num_steps,
            drafted_tokens=self.speculator.num_drafted_tokens,
            accepted_tokens=self._num_accepted_tokens,
            resident=resident,
            waiting=self.scheduler.waiting_adapters,
            backends=frozenset({self.runner.backend.name}),
            fallbacks=frozenset(self.runner.backend.fallbacks),
        )

    def check(self, request: GenerationRequest) -> None:
        """Raise InvalidInput if the request could never run, and NotReady if its grammar wasn't checked."""
        request.check(self.max_num_tokens, self._vocab_size)
        if request.grammar is not None and not (self._guidance and self._guidance.holds(request.grammar)):
            raise NotReady("the grammar is not compiled")

    def add(self, request: GenerationRequest) -> None:
        """Queue the `n` sequences of a request that `check` has accepted."""
        arrival, params = self._clock(), request.sampling
        for index in range(request.n):
            sequence = Sequence(request, index, arrival, self.config.block_size)
            if request.grammar is not None:
                assert self._guidance is not None
                sequence.constraint = self._guidance.constraint(request.grammar)
            sequence.end_token_ids = self._end_token_ids(request)
            if params.min_tokens:
                sequence.end_mask = np.zeros(self._vocab_size, np.bool_)
                sequence.end_mask[list(sequence.end_token_ids)] = True
            self._streams[sequence] = TextStream(self._token_bytes, params.stop, params.min_tokens)
            self._requests.setdefault(request.request_id, []).append(sequence)
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Remove the unfinished sequences of a request. They produce no further outputs."""
        for sequence in list(self._requests.get(request_id, ())):
            self._remove(sequence)

    def abort_all(self, error: SmoloraError) -> list[SequenceOutput]:
        """End all sequences with this error, and return their last outputs."""
        return [self._fail(sequence, error) for sequence in list(self.scheduler.sequences())]

    def step(self) -> list[SequenceOutput]:
        """Run one step, and return its outputs."""
        try:
            if self._masks is not None:
                self._masks.prepare(self.scheduler.running)
            step = self.scheduler.schedule()
        except Exception as reason:
            # `schedule` has removed these failed sequences already, and its report of them is lost.
            lost = [s for s in self._streams if s.status is Status.FINISHED]
            culprit = self.scheduler.at_work
            if culprit is None:
                return self._fail_step(reason, lost)
            log.exception("a sequence failed while its step was scheduled")
            return [self._fail(sequence, GenerationFailed(_STEP_FAILED)) for sequence in [*lost, culprit]]
        outputs = [self._fail(failed.sequence, failed.error) for failed in step.failed]
        if not step.chunks:
            return outputs
        try:
            begun, begun_work = self._clock(), time.thread_time()
            chunks = self.speculator.extend(step.chunks)
            found = self.runner.run(chunks)
            took, worked = self._clock() - begun, time.thread_time() - begun_work
            self.speculator.observe(chunks, took)
            self.scheduler.observe(chunks, took, worked)
        except Exception as reason:
            return outputs + self._fail_step(reason, [chunk.sequence for chunk in step.chunks])
        self.num_failures = 0
        self.num_steps += 1
        for chunk in step.chunks:
            try:
                self._mark_computed(chunk)
                is_computed = chunk.is_last and not chunk.sequence.draws
                if is_computed and not chunk.sequence.advance():
                    outputs.append(self._finish_scoring(chunk.sequence))
            except Exception:
                outputs.append(self._fail_alone(chunk.sequence))
        for drawn in found:
            try:
                self._take(drawn, outputs)
            except Exception:
                outputs.append(self._fail_alone(drawn.chunk.sequence))
        return outputs

    def close(self) -> None:
        """Stop the engine's threads. The engine can't be used afterwards."""
        if self._masks is not None:
            self._masks.close()
        for executor in self._loaders:
            executor.shutdown(wait=True, cancel_futures=True)

    def _fail_step(self, reason: Exception, sequences: Seq[Sequence]) -> list[SequenceOutput]:
        """Log why a step failed, and end these sequences, or all sequences if too many steps failed in a row."""
        log.error("a step failed", exc_info=reason)
        self.num_failures += 1
        error = reason if isinstance(reason, GenerationFailed) else GenerationFailed(_STEP_FAILED)
        outputs = [self._fail(sequence, error) for sequence in sequences]
        return outputs + (self.abort_all(EngineDead()) if self.is_dead else [])

    def _fail_alone(self, sequence: Sequence) -> SequenceOutput:
        """Log the exception that is being handled, and end this sequence and no other."""
        log.exception("a sequence failed after its step")
        return self._fail(sequence, GenerationFailed(_STEP_FAILED))

    def _mark_computed(self, chunk: Chunk) -> None:
        """Record that a chunk's keys and values are in the cache."""
        sequence = chunk.sequence
        if chunk.samples and sequence.num_output_tokens == 0:  # count a prompt once, even after preemptions
            self._count_prompt(sequence)
        sequence.num_computed_tokens = chunk.stop
        self.blocks.mark_computed(sequence)

    def _count_prompt(self, sequence: Sequence) -> None:
        self._num_prefix_tokens += sequence.num_cached_tokens
        self._num_prompt_tokens += sequence.num_prompt_tokens

    def _take(self, drawn: Drawn, outputs: list[SequenceOutput]) -> None:
        """Append the drawn tokens to their sequence until a token ends the sequence."""
        sequence = drawn.chunk.sequence
        if sequence not in self._streams:  # it failed after the step
            return
        for num, token in enumerate(drawn.agreed()):
            if num:  # the token before this one was drafted, so the step has computed it
                self._num_accepted_tokens += 1
                sequence.num_computed_tokens += 1
                self.blocks.mark_computed(sequence)
            outputs.append(self._append(sequence, token))
            if sequence.status is Status.FINISHED:
                return
        if drawn.chunk.draft:
            self.blocks.trim(sequence)

    def _append(self, sequence: Sequence, token: Sampled) -> SequenceOutput:
        """Append a token to its sequence, end the sequence if it is complete, and return the output."""
        params, constraint = sequence.request.sampling, sequence.constraint
        scores, logprobs = self._scored(sequence)
        if not all(map(math.isfinite, scores)):
            return self._fail(sequence, _overflow(sequence))
        if token.token_id is None:
            error = None if constraint is None else constraint.error
            return self._fail(sequence, error or _overflow(sequence))
        stream, now = self._streams[sequence], self._clock()
        sequence.token_ids.append(token.token_id)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        self._num_output_tokens += 1
        reason: FinishReason | None = None
        if token.token_id in sequence.end_token_ids:
            text = stream.push(token.token_id) if token.token_id in params.stop_token_ids else ""
            reason = "stop"
        else:
            text = stream.push(token.token_id)
            if constraint is not None:
                constraint.accept(token.token_id)
                if constraint.error is not None:  # reported even if this token would have been the last
                    return self._fail(sequence, constraint.error)
            if stream.stopped or (constraint is not None and constraint.is_complete):
                reason = "stop"
        if reason is None and sequence.num_output_tokens == params.max_tokens:
            reason = "length"
        if reason is not None:
            text += stream.finish()
            reason = "stop" if stream.stopped else reason
            self._remove(sequence)
        if token.logprobs is not None:
            logprobs = (*logprobs, self._token_bytes.describe(token.token_id, token.logprobs))
        return self._output(
            sequence, text=text, num_new_tokens=1, logprobs=logprobs, scores=scores, finish_reason=reason
        )

    def _finish_scoring(self, sequence: Sequence) -> SequenceOutput:
        """End a sequence that draws no tokens, and whose tokens have all been scored."""
        self._count_prompt(sequence)
        scores, logprobs = self._scored(sequence)
        if sequence.trie is not None:
            self._num_output_tokens += sequence.trie.num_tokens
        if not all(map(math.isfinite, scores)):
            return self._fail(sequence, _overflow(sequence))
        self._remove(sequence)
        num = sequence.num_output_tokens
        return self._output(sequence, num_new_tokens=num, scores=scores, logprobs=logprobs, finish_reason="length")

    def _scored(self, sequence: Sequence) -> tuple[tuple[float, ...], tuple[SampledLogprob, ...]]:
        """Return the scores of the prompt's tokens, and their log-probabilities if the request asks for them.

        If the request has continuations, the scores are theirs. Both are empty if the request scores nothing, or
        has a generated token and thus got its scores.
        """
        if sequence.trie is not None:
            return sequence.trie.scores(), ()
        if sequence.scored_from is None:
            return (), ()
        found = sorted(sequence.scores.items())
        assert len(found) == sequence.num_tokens - sequence.scored_from
        scores = tuple(score.chosen for _, score in found)
        if not sequence.request.sampling.logprobs:
            return scores, ()
        describe = self._token_bytes.describe
        return scores, tuple(describe(sequence.token_ids[position], score) for position, score in found)

    def _end_token_ids(self, request: GenerationRequest) -> frozenset[int]:
        """Return the tokens that end an answer to the request."""
        own = frozenset(request.sampling.stop_token_ids)
        return own if request.sampling.ignore_eos and request.grammar is None else self._eos | own

    def _fail(self, sequence: Sequence, error: SmoloraError) -> SequenceOutput:
        self._remove(sequence)
        return self._output(sequence, finish_reason="abort", error=error)

    def _remove(self, sequence: Sequence) -> None:
        if self._streams.pop(sequence, None) is not None:
            self.scheduler.finish(sequence)
            self.speculator.forget(sequence)
            request_id = sequence.request.request_id
            self._requests[request_id].remove(sequence)
            if not self._requests[request_id]:
                del self._requests[request_id]

    def _output(
        self,
        sequence: Sequence,
        *,
        text: str = "",
        num_new_tokens: int = 0,
        logprobs: tuple[SampledLogprob, ...] = (),
        scores: tuple[float, ...] = (),
        finish_reason: FinishReason | None = None,
        error: SmoloraError | None = None,
    ) -> SequenceOutput:
        return SequenceOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            text=text,
            num_new_tokens=num_new_tokens,
            num_output_tokens=sequence.num_output_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            logprobs=logprobs,
            scores=scores,
            finish_reason=finish_reason,
            error=error,
            timing=None if finish_reason is None else sequence.timing(self._clock()),
        )


def _overflow(sequence: Sequence) -> SmoloraError:
    """Return the error for logits that aren't finite. The error blames the sequence's adapters, if any."""
    if sequence.request.adapters:
        message = "the model's numbers overflowed under these adapters; use smaller adapters or weights"
        return InvalidInput.of("adapter", message)
    return GenerationFailed("the base model's numbers overflowed")
