"""Measure adapters with the serving engine: completions, exact match, and the scores of decisions' options.

On a CPU these are the answers that users will get; on a GPU torch computes them. Training jobs and evaluations use
the same functions. `complete` and `decision_scores` are passed to `server.training.run.Run`, so that
`server.training` doesn't import the engine.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from adapters.errors import InvalidInput
from adapters.lora import AdapterRef, LoraWeights
from adapters.merge import WeightedAdapters
from server.engine.backend import Backend
from server.engine.detokenizer import TokenBytes
from server.engine.engine import Engine, EngineConfig
from server.engine.native_backend import NativeBackend
from server.engine.request import GenerationRequest, SamplingParams, SequenceOutput
from server.engine.scheduler import SchedulerLimits
from server.engine.torch_backend import TorchBackend
from server.errors import GenerationFailed
from server.jobs.events import without_nul
from server.model.base.weights import BaseModel
from server.model.native.model import ROW_FORMAT, NativeModel
from server.model.rank_rows import RowFormat
from server.model.smollm import SmolLM
from server.model.text.tokenizer import vocabulary_of
from server.training.encoding import Asked, Reference, Sample
from server.training.job_data import JobData

MORE_TOKENS = 8
"""Tokens that a completion may have beyond its reference's length."""
MORE_JSON_TOKENS = 256
"""The same for a completion that is to satisfy a schema, since a longer answer than the reference may do so."""
MAX_SAMPLE_TOKENS = 64
"""The most tokens of an answer to a sample."""
MAX_CACHED_TOKENS = 8192
"""Tokens in the KV cache, unless a single completion needs more: 190 MB on the 135M base."""
MAX_ADAPTER_BYTES = 4 << 30
"""The most memory for an adapter, if all linear modules had its largest rank: rank 3,500 on the 135M base."""

log = logging.getLogger("smolora.training")


def _go_on() -> None:
    pass


def complete(
    base: BaseModel,
    weights: LoraWeights | None,
    samples: Sequence[Sample],
    references: Sequence[Reference],
    yield_or_leave: Callable[[], None] = _go_on,
    *,
    library: ctypes.CDLL | None = None,
) -> tuple[list[str | None], list[bool] | None]:
    """Return the greedy answer to each sample, and for each reference whether its completion equals its text.

    One engine computes both, since its start takes longer than a few answers.

    Answers have at most `MAX_SAMPLE_TOKENS` tokens, and end as in `completions`. References are compared without
    whitespace at both ends. Their completions end as soon as they can't become equal to the text any more, too. A
    prompt without a completion counts as not equal. Instead of the comparisons, return None if there are no
    references, or if the adapter needs more than `MAX_ADAPTER_BYTES`. In the second case, and if the model's
    numbers overflow in an answer, all answers are None: samples fail no job.
    """
    unanswered: list[str | None] = [None] * len(samples)
    if weights is not None and adapter_bytes(base, weights) > MAX_ADAPTER_BYTES:
        log.warning("exact match isn't measured: an adapter of rank %s needs too much memory", weights.max_rank)
        return unanswered, None
    most = MAX_SAMPLE_TOKENS - MORE_TOKENS
    asked = [replace(one.reference, num_tokens=min(one.reference.num_tokens, most)) for one in samples]
    adapters = () if weights is None else ((weights, 1.0),)
    try:
        found = completions(
            base, adapters, [*asked, *references], yield_or_leave, library, gives_up_from=len(asked)
        )
    except (GenerationFailed, InvalidInput) as error:
        if not samples:
            raise
        log.warning("samples aren't answered: %s", error)
        return unanswered, complete(base, weights, (), references, yield_or_leave, library=library)[1]
    answers = [None if text is None else without_nul(text) for text in found[: len(asked)]]
    compared = zip(found[len(asked) :], references, strict=True)
    return answers, [is_exact(text, reference) for text, reference in compared] if references else None


def is_exact(completion: str | None, reference: Reference) -> bool:
    """Return whether the completion equals the reference's text, without whitespace at both ends."""
    return completion is not None and completion.strip() == reference.text.strip()


def completions(
    base: BaseModel,
    adapters: WeightedAdapters,
    references: Sequence[Reference],
    yield_or_leave: Callable[[], None] = _go_on,
    library: ctypes.CDLL | None = None,
    *,
    gives_up_from: int | None = None,
    more_tokens: Sequence[int] | None = None,
) -> list[str | None]:
    """Return the greedy completion of each reference's prompt under the weighted sum of the adapters.

    A completion ends at an end token, or when it is longer than the reference's text by as many tokens as
    `more_tokens` has for the reference (default: `MORE_TOKENS`). Those of `references[gives_up_from:]` also end as
    soon as they can't become equal to that text any more. A completion is None if the prompt is empty or leaves no
    room for a completion in the base's context. `yield_or_leave` is called before each step of the engine. If
    `library` is given, native code computes the steps.
    """
    limit = base.config.max_position_embeddings
    requests: list[GenerationRequest] = []
    texts: dict[int, str] = {}
    for number, reference in enumerate(references):
        room = limit - len(reference.prompt)
        if room > 0 and reference.prompt:
            more = MORE_TOKENS if more_tokens is None else more_tokens[number]
            sampling = SamplingParams(min(reference.num_tokens + more, room), temperature=0.0)
            requests.append(GenerationRequest(str(number), reference.prompt, sampling, _refs(adapters)))
            texts[number] = ""
    if requests:
        lengths = [len(request.prompt_token_ids) + request.sampling.max_tokens for request in requests]
        engine = engine_for(base, [weights for weights, _ in adapters], lengths, library)
        try:
            for output in outputs_of(engine, requests, yield_or_leave):
                number = int(output.request_id)
                texts[number] += output.text
                has_ended = output.finish_reason is not None
                gives_up = gives_up_from is not None and number >= gives_up_from
                if gives_up and not has_ended and not _may_become(texts[number], references[number].text.strip()):
                    engine.abort(output.request_id)
        finally:
            engine.close()
    return [texts.get(number) for number in range(len(references))]


def option_scores(
    base: BaseModel,
    adapters: WeightedAdapters,
    asked: Sequence[Asked],
    options: Mapping[str, tuple[tuple[int, ...], ...]],
    yield_or_leave: Callable[[], None] = _go_on,
    library: ctypes.CDLL | None = None,
) -> list[tuple[float, ...]]:
    """Return the log-probabilities of each decision's options under the weighted sum of the adapters.

    `options` has the options' tokens by the question's digest. The other arguments are those of `completions`.
    Raise InvalidInput or GenerationFailed if the model's numbers overflow.
    """
    if not asked:
        return []
    requests = [
        GenerationRequest(
            *(str(number), one.prompt, SamplingParams(max_tokens=0), _refs(adapters)),
            scored_from=len(one.prompt),
            continuations=options[one.question],
        )
        for number, one in enumerate(asked)
    ]
    lengths = [len(one.prompt_token_ids) + max(map(len, one.continuations)) for one in requests]
    engine = engine_for(base, [weights for weights, _ in adapters], lengths, library)
    try:
        outputs = outputs_of(engine, requests, yield_or_leave)
        found = {int(output.request_id): output.scores for output in outputs if output.finish_reason is not None}
    finally:
        engine.close()
    return [found[number] for number in range(len(asked))]


def decision_scores(
    base: BaseModel,
    weights: LoraWeights | None,
    data: JobData,
    yield_or_leave: Callable[[], None] = _go_on,
    *,
    library: ctypes.CDLL | None = None,
) -> list[tuple[float, ...]] | None:
    """Return `option_scores` of a training job's held-out decisions.

    A row has none if its question has no training row, or if it doesn't fit the base's context. Return None if
    there are no other rows, if the adapter needs more than `MAX_ADAPTER_BYTES`, or if the model's numbers
    overflow: the job doesn't fail.
    """
    if weights is not None and adapter_bytes(base, weights) > MAX_ADAPTER_BYTES:
        return None
    limit = base.config.max_position_embeddings
    numbers = [
        number
        for number, one in enumerate(data.asked)
        if (options := data.options.get(one.question)) and len(one.prompt) + max(map(len, options)) <= limit
    ]
    if not numbers:
        return None
    adapters = () if weights is None else ((weights, 1.0),)
    asked = [data.asked[number] for number in numbers]
    try:
        scores = option_scores(base, adapters, asked, data.options, yield_or_leave, library)
    except (GenerationFailed, InvalidInput) as error:
        log.warning("decisions aren't measured: %s", error)
        return None
    found = dict(zip(numbers, scores, strict=True))
    return [found.get(number, ()) for number in range(len(data.asked))]


def adapter_bytes(base: BaseModel, weights: LoraWeights) -> int:
    """Return the bytes that torch needs for the adapter. Native code needs less."""
    return weights.max_rank * RowFormat.of_torch(base.dtype, base.device).bytes_per_rank(base.config.shape)


def outputs_of(
    engine: Engine, requests: Iterable[GenerationRequest], yield_or_leave: Callable[[], None]
) -> Iterator[SequenceOutput]:
    """Run the requests, and yield their outputs. Raise the error of the first that fails.

    `yield_or_leave` is called before each step.
    """
    for request in requests:
        engine.add(request)
    while engine.has_work:
        yield_or_leave()
        outputs = engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
            yield output
        if not outputs:
            time.sleep(0.001)  # the adapter is still being loaded


def engine_for(
    base: BaseModel, adapters: Iterable[LoraWeights], lengths: Sequence[int], library: ctypes.CDLL | None
) -> Engine:
    """Make an engine for sequences of these lengths in tokens. It uses the base that is already in memory."""
    longest = max(lengths)
    backend = _backend(base, longest, library)
    cached = max(longest + EngineConfig.block_size, min(sum(lengths), MAX_CACHED_TOKENS))
    by_digest = {weights.digest: weights for weights in adapters}
    num_rows = sum(ROW_FORMAT.rounded(weights.max_rank) for weights in by_digest.values())
    config = EngineConfig(
        max_model_len=longest,
        kv_cache_bytes=cached * backend.bytes_per_block(1),
        adapter_cache_bytes=max(num_rows, 1) * backend.bytes_per_rank,
        scheduler=SchedulerLimits.on(base.device.type),
    )
    return Engine(backend, TokenBytes(*vocabulary_of(base.tokenizer)), by_digest.__getitem__, config)


def _refs(adapters: WeightedAdapters) -> tuple[AdapterRef, ...]:
    return tuple(sorted(AdapterRef(weights.digest, weight) for weights, weight in adapters))


def _may_become(text: str, wanted: str) -> bool:
    """Return whether `text`, with more text appended and stripped, can equal `wanted`."""
    begun = text.lstrip()
    return wanted.startswith(begun) or begun.rstrip() == wanted


def _backend(base: BaseModel, max_positions: int, library: ctypes.CDLL | None) -> Backend:
    """Return the native backend, or torch's if there is no library or too little memory for native weights."""
    if library is not None:
        try:
            return NativeBackend(
                NativeModel(
                    library,
                    base.config,
                    base.weights,
                    max_positions=max_positions,
                    num_threads=torch.get_num_threads(),
                )
            )
        except MemoryError as reason:
            log.info("%s: torch completes, more slowly", reason)
    return TorchBackend(SmolLM(base.config, base.weights, max_positions=max_positions))
