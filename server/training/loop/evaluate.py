"""How good a model is on rows that it was not trained on: loss, accuracy and exact match, dropout off.

`evaluate` reads each row once and asks what the model makes of every counted token, given the true ones before it.
`exact_match` lets it complete rows by itself, with the engine that serves, so that it promises what users get.
Which rows, and what becomes of the numbers, is the caller's.
"""

import ctypes
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapters.errors import SmoloraError
from adapters.lora import LoraWeights
from server.engine.backend import Backend, NativeBackend, TorchBackend
from server.engine.detokenizer import TokenBytes
from server.engine.engine import Engine, EngineConfig
from server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from server.engine.scheduler import SchedulerLimits
from server.model.base.weights import BaseModel
from server.model.device import to_device
from server.model.native.model import NativeModel
from server.model.smollm import Adapters, SmolLM
from server.model.text.vocabulary import vocabulary_of
from server.training.data.encoding import Reference
from server.training.data.examples import Example
from server.training.loop.packing import pack
from server.training.passes.loss import CHUNK
from server.training.passes.packed_attention import PackedAttention

MAX_TOKENS = 2048
"""Of a micro-batch; a longer row is one of its own."""
MORE_TOKENS = 8
"""How many tokens more than the reference has a completion may take."""
MAX_CACHED_TOKENS = 8192
"""Keys and values that completions keep at one time, unless a single one needs more: 190 MB on the 135M base."""
MAX_LOSS = 700.0
"""Nats, beyond which a perplexity would not be a finite number."""


log = logging.getLogger("smolora.training")


class LossNotFinite(SmoloraError):
    """What trained weights are to be compared with has a held-out loss that is no number."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `exact_match` is a share of the completions asked for; None where none was."""

    loss: float  # nats per counted token
    accuracy: float  # of the likeliest token, given the true ones before it
    num_rows: int
    num_tokens: int  # counted
    exact_match: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number that others can be compared with."""
        return math.isfinite(self.loss)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, MAX_LOSS))


def _go_on() -> None:
    pass


def evaluate(
    model: SmolLM,
    adapters: Adapters,
    examples: Sequence[Example],
    *,
    max_tokens: int = MAX_TOKENS,
    yield_or_leave: Callable[[], None] = _go_on,
) -> Evaluation:
    """Loss and accuracy over the tokens of `examples` that are trained on, of which there must be some.

    `yield_or_leave` is called before each micro-batch, and may raise. `max_tokens` changes the result by rounding
    alone."""
    loss, num_right, num_tokens = 0.0, 0, 0
    for indices in pack([len(example.token_ids) for example in examples], max_tokens):
        yield_or_leave()
        batch = [examples[index] for index in indices]
        found = _micro_batch(model, adapters, batch)
        loss, num_right, num_tokens = loss + found[0], num_right + found[1], num_tokens + found[2]
    if not num_tokens:
        raise ValueError("nothing to evaluate: no example has a token that is trained on")
    return Evaluation(loss / num_tokens, num_right / num_tokens, len(examples), num_tokens)


@torch.no_grad()
def _micro_batch(model: SmolLM, adapters: Adapters, batch: Sequence[Example]) -> tuple[float, int, int]:
    """(summed loss, tokens guessed right, tokens counted)."""
    device = model.device
    token_ids = torch.tensor([token for example in batch for token in example.token_ids])
    is_target = torch.tensor([flag for example in batch for flag in example.is_target])
    counted = is_target.nonzero()[:, 0]  # never a row's first token, so the one before it is of the same row
    targets = to_device(token_ids[counted], device)
    attention = PackedAttention([len(example.token_ids) for example in batch], device)
    hidden = model.forward(to_device(token_ids, device), attention.positions, attention, adapters)
    hidden = hidden[to_device(counted - 1, device)]  # (counted, hidden)
    losses, nums_right = [], []
    for rows, chosen in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
        logits = model.logits(rows)  # (chunk, vocab), fp32
        losses.append(torch.nn.functional.cross_entropy(logits, chosen, reduction="sum"))
        nums_right.append((logits.argmax(-1) == chosen).sum())
    return sum(torch.stack(losses).tolist()), sum(torch.stack(nums_right).tolist()), len(targets)


def exact_match(
    base: BaseModel,
    weights: LoraWeights | None,
    references: Sequence[Reference],
    *,
    yield_or_leave: Callable[[], None] = _go_on,
    library: ctypes.CDLL | None = None,
) -> float | None:
    """The share of references that greedy completions equal, both stripped of whitespace around them.

    A completion ends at an end token, or `MORE_TOKENS` after the reference's length; it is given up at the first
    token with which it can't become equal any more. A prompt that leaves no room for one in the base's context
    counts as missed. None where there are no references. `yield_or_leave` is called before each step of the
    engine.
    With `library`, native code computes the steps.
    """
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
    num_matched = _count_matches(base, weights, requests, wanted, yield_or_leave, library) if requests else 0
    return num_matched / len(references) if references else None


def _count_matches(
    base: BaseModel,
    weights: LoraWeights | None,
    requests: dict[str, GenerationRequest],
    wanted: dict[str, str],
    yield_or_leave: Callable[[], None],
    library: ctypes.CDLL | None,
) -> int:
    lengths = [len(r.prompt_token_ids) + r.sampling.max_tokens for r in requests.values()]
    engine = _engine(base, weights, lengths, library)
    texts = dict.fromkeys(requests, "")
    num_matched = 0
    try:
        for request in requests.values():
            engine.add(request)
        while engine.has_work:
            yield_or_leave()
            outputs = engine.step()
            for output in outputs:
                if output.error is not None:
                    raise output.error
                name = output.request_id
                texts[name] += output.text
                if output.finish_reason is not None:
                    num_matched += texts[name].strip() == wanted[name]
                elif not _may_become(texts[name], wanted[name]):
                    engine.abort(name)
            if not outputs:
                time.sleep(0.001)  # the adapter is being read
    finally:
        engine.close()
    return num_matched


def _may_become(text: str, wanted: str) -> bool:
    """Whether more text can make `text`, once stripped, the stripped text `wanted`."""
    begun = text.lstrip()
    return wanted.startswith(begun) or begun.rstrip() == wanted


def _engine(
    base: BaseModel, weights: LoraWeights | None, lengths: Sequence[int], library: ctypes.CDLL | None
) -> Engine:
    """An engine for sequences of up to `lengths` tokens, over the base as it lies in memory."""
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
    """The library's; torch's without one, and where the library's copy of the weights doesn't fit into memory."""
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
