"""Measure exact match: which rows a model completes exactly.

The serving engine generates the completions, so they are what users will get. The function `exact_match` is passed
to `server.training.run.Run`, so that `server.training` doesn't import the engine.
"""

import ctypes
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from adapters.lora import AdapterRef, LoraWeights
from server.engine.backend import Backend
from server.engine.detokenizer import TokenBytes
from server.engine.engine import Engine, EngineConfig
from server.engine.native_backend import NativeBackend
from server.engine.request import GenerationRequest, SamplingParams, SequenceOutput
from server.engine.scheduler import SchedulerLimits
from server.engine.torch_backend import TorchBackend
from server.model.base.weights import BaseModel
from server.model.native.model import NativeModel
from server.model.rank_rows import RowFormat
from server.model.smollm import SmolLM
from server.model.text.tokenizer import vocabulary_of
from server.training.encoding import Reference

MORE_TOKENS = 8
"""Tokens that a completion may have beyond its reference's length."""
MAX_CACHED_TOKENS = 8192
"""Tokens in the KV cache, unless a single completion needs more: 190 MB on the 135M base."""
MAX_ADAPTER_BYTES = 4 << 30
"""The most memory for an adapter, if all linear modules had its largest rank: rank 3,500 on the 135M base."""

log = logging.getLogger("smolora.training")


def _go_on() -> None:
    pass


def exact_match(
    base: BaseModel,
    weights: LoraWeights | None,
    references: Sequence[Reference],
    yield_or_leave: Callable[[], None] = _go_on,
    *,
    library: ctypes.CDLL | None = None,
) -> list[bool] | None:
    """Return for each reference whether the greedy completion of its prompt equals its text.

    Whitespace at both ends is ignored. A completion ends at an end token, when it is `MORE_TOKENS` tokens longer
    than the text, or as soon as it can't become equal to the text any more. A prompt that leaves no room for a
    completion in the base's context counts as not equal. Return None if there are no references, or if the adapter
    needs more than `MAX_ADAPTER_BYTES`. `yield_or_leave` is called before each step of the engine. If `library` is
    given, native code computes the steps.
    """
    if weights is not None and adapter_bytes(base, weights) > MAX_ADAPTER_BYTES:
        log.warning("exact match isn't measured: an adapter of rank %s needs too much memory", weights.max_rank)
        return None
    limit = base.config.max_position_embeddings
    requests: dict[str, GenerationRequest] = {}
    wanted: dict[str, str] = {}
    adapters = () if weights is None else (AdapterRef(weights.digest),)
    for number, reference in enumerate(references):
        room = limit - len(reference.prompt)
        if room > 0 and reference.prompt:
            sampling = SamplingParams(min(reference.num_tokens + MORE_TOKENS, room), temperature=0.0)
            requests[str(number)] = GenerationRequest(str(number), reference.prompt, sampling, adapters)
            wanted[str(number)] = reference.text.strip()
    if not references:
        return None
    matched = _matched(base, weights, requests, wanted, yield_or_leave, library) if requests else set()
    return [str(number) in matched for number in range(len(references))]


def adapter_bytes(base: BaseModel, weights: LoraWeights) -> int:
    """Return the bytes that torch needs for the adapter. Native code needs less."""
    return weights.max_rank * RowFormat.of_torch(base.dtype, base.device).bytes_per_rank(base.config.shape)


def _matched(
    base: BaseModel,
    weights: LoraWeights | None,
    requests: dict[str, GenerationRequest],
    wanted: dict[str, str],
    yield_or_leave: Callable[[], None],
    library: ctypes.CDLL | None,
) -> set[str]:
    """Return the names of the requests whose completions equal their texts in `wanted`."""
    lengths = [len(r.prompt_token_ids) + r.sampling.max_tokens for r in requests.values()]
    engine = engine_for(base, weights, lengths, library)
    texts = dict.fromkeys(requests, "")
    matched = set[str]()
    try:
        for output in outputs_of(engine, requests.values(), yield_or_leave):
            name = output.request_id
            texts[name] += output.text
            if output.finish_reason is not None:
                if texts[name].strip() == wanted[name]:
                    matched.add(name)
            elif not _may_become(texts[name], wanted[name]):
                engine.abort(name)
    finally:
        engine.close()
    return matched


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


def _may_become(text: str, wanted: str) -> bool:
    """Return whether `text`, with more text appended and stripped, can equal `wanted`."""
    begun = text.lstrip()
    return wanted.startswith(begun) or begun.rstrip() == wanted


def engine_for(
    base: BaseModel, weights: LoraWeights | None, lengths: Sequence[int], library: ctypes.CDLL | None
) -> Engine:
    """Make an engine for sequences of these lengths in tokens. It uses the base that is already in memory."""
    longest = max(lengths)
    backend = _backend(base, longest, library)
    cached = max(longest + EngineConfig.block_size, min(sum(lengths), MAX_CACHED_TOKENS))
    config = EngineConfig(
        max_model_len=longest,
        kv_cache_bytes=cached * backend.bytes_per_block(1),
        adapter_cache_bytes=(1 if weights is None else weights.max_rank) * backend.bytes_per_rank,
        scheduler=SchedulerLimits.on(base.device.type),
    )

    def load(digest: str) -> LoraWeights:
        assert weights is not None
        return weights

    return Engine(backend, TokenBytes(*vocabulary_of(base.tokenizer)), load, config)


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
