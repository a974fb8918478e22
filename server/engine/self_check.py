"""A check of a backend on this machine: fixed prompts, whose answers are compared with the torch backend's.

Answers may diverge at near ties, so tokens aren't compared. Instead torch scores the tokens that the backend
chose: its log-probabilities must be the backend's, and no other token may be much likelier. Seeded draws are
compared as texts, and some may differ. In one batch the same prompts must have the same bits, if the backend
claims so.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch

from adapters.lora import MODULES, AdapterRef, BaseShape, LoraModule, LoraWeights, ModuleKey
from server.engine.backend import Backend
from server.engine.detokenizer import TokenBytes
from server.engine.engine import Engine, EngineConfig
from server.engine.request import GenerationRequest, SampledLogprob, SamplingParams
from server.errors import StartupError
from server.model.base.weights import BaseModel
from server.model.text.tokenizer import vocabulary_of

MARGINS = {torch.float32: 0.01, torch.bfloat16: 0.25, torch.float16: 0.05}
"""The largest difference of log-probabilities in nats, by the base's dtype. Sound native code in bf16 has 0.11."""
MAX_DIVERGED_DRAWS = 0.5
"""The largest share of seeded answers that may differ. With other noise, all do."""
MAX_LENGTH = 704
"""The most tokens of a sequence of the check: three splits of the cuda backend's attention."""
_NUM_BLOCKS = 192
_NUM_TOKENS = 24
_NUM_DRAWS = 16
log = logging.getLogger(__name__)
_TEXT = (
    "Paris is the capital of France. It lies on the river Seine, and about two million people live there. "
    "The city is known for its museums, among them the Louvre, and for a tower of iron that Gustave Eiffel's "
    "company built for the world's fair of 1889. "
)


@dataclass(frozen=True)
class Comparison:
    """One line of the check: the largest difference among `num` compared values, and its margin."""

    name: str
    num: int
    unit: str
    difference: float
    margin: float

    @property
    def is_within(self) -> bool:
        return self.difference <= self.margin

    def __str__(self) -> str:
        return f"{self.name}: {self.difference:.2g} {self.unit}, margin {self.margin:.2g}"


@dataclass(frozen=True)
class SelfCheck:
    """What a check found. `is_batch_invariant`: whether the answers had the same bits alone and in a batch."""

    comparisons: tuple[Comparison, ...]
    is_batch_invariant: bool

    @property
    def beyond(self) -> str:
        """The comparisons beyond their margins, or an empty text if there is none."""
        return "; ".join(str(one) for one in self.comparisons if not one.is_within)


@dataclass
class _Answer:
    text: str = ""
    entries: list[SampledLogprob] = field(default_factory=list)
    scores: tuple[float, ...] = ()


_Answers = dict[tuple[str, int], _Answer]
Make = Callable[[], Backend]
"""Returns a new backend, without memory."""


def checked(base: BaseModel, make: Make, make_oracle: Make, max_length: int) -> Backend:
    """Return a backend that answers as torch does, or torch's with the reason in its `fallbacks`.

    If bits depend on the batch, the backend doesn't claim otherwise. Don't raise errors of the backend, except
    StartupError if they have made the GPU unusable for this process.
    """
    try:
        found = check(base, make(), make_oracle(), max_length)
    except Exception as error:
        log.exception("the self-check of the backend failed")
        _require_gpu(base)
        return _fallback(make_oracle, f"the self-check failed ({type(error).__name__}): see the log")
    if found.beyond:
        return _fallback(make_oracle, f"answers differ from torch's: {found.beyond}")
    backend = make()
    if backend.is_batch_invariant and not found.is_batch_invariant:
        backend.is_batch_invariant = False
        reason = "bits depend on the batch, so answers aren't reproducible and nothing is drafted"
        log.error("%s: %s", backend.name, reason)
        backend.fallbacks.append(f"{backend.name}: {reason}")
    return backend


def _require_gpu(base: BaseModel) -> None:
    """Raise StartupError if torch can't read the base's weights: an illegal access ends the CUDA context."""
    try:
        base.weights.final_norm.cpu()
    except RuntimeError:
        raise StartupError(
            "the GPU's kernels failed in their self-check (see the log), and this process can't use the GPU any "
            "more: set SMOLORA_NATIVE=0 to serve by torch"
        ) from None


def _fallback(make_oracle: Make, reason: str) -> Backend:
    log.error("torch serves, since %s", reason)
    backend = make_oracle()
    backend.fallbacks.append(f"torch serves: {reason}")
    return backend


def check(base: BaseModel, backend: Backend, oracle: Backend, max_length: int) -> SelfCheck:
    """Compare a backend with the torch backend. Neither may have memory yet; both are useless afterwards.

    Sequences have at most `max_length` tokens.
    """
    adapters = {"a": _adapter(base.config.shape, 1, 8), "b": _adapter(base.config.shape, 2, 20)}
    requests = _requests(base, min(max_length, MAX_LENGTH, base.config.max_position_embeddings))
    engine = _engine(base, backend, adapters)
    try:
        alone: _Answers = {}
        for request in requests:
            alone |= _run(engine, [request])
        # Another project shares no cached prefix.
        batch = _run(engine, [replace(request, project="batch") for request in requests])
    finally:
        engine.close()
    engine = _engine(base, oracle, adapters)
    try:
        margin = MARGINS[base.dtype]
        found = [_compared(engine, request, alone[request.request_id, 0], margin) for request in requests[:-1]]
        expected = _run(engine, requests[-1:])
    finally:
        engine.close()
    diverged = sum(alone[key].text != answer.text for key, answer in expected.items())
    draws = Comparison("seeded", len(expected), "of the answers", diverged / len(expected), MAX_DIVERGED_DRAWS)
    return SelfCheck((*found, draws), all(batch[key] == answer for key, answer in alone.items()))


def _requests(base: BaseModel, max_length: int) -> list[GenerationRequest]:
    """Return the requests. The last one is seeded; the others are greedy, with log-probabilities."""
    text = base.tokenizer.backend.encode(_TEXT, add_special_tokens=False).ids
    long = (text * (max_length // len(text) + 1))[: max_length - _NUM_TOKENS]
    prompt = tuple(long[: len(text)])
    greedy = SamplingParams(max_tokens=_NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=1)
    seeded = SamplingParams(max_tokens=3, temperature=0.9, seed=7, ignore_eos=True)
    one, other = AdapterRef("a", 0.6), AdapterRef("b", -0.5)
    return [
        GenerationRequest("base", prompt, greedy),
        GenerationRequest("cached prefix", tuple(long[: len(text) + 9]), greedy),
        GenerationRequest("long prompt", tuple(long), greedy),
        GenerationRequest("adapter", prompt, greedy, (AdapterRef("a", 1.0),)),
        GenerationRequest("blend", prompt, greedy, (one, other)),
        GenerationRequest("seeded", prompt, seeded, (one,), n=_NUM_DRAWS),
    ]


def _compared(engine: Engine, request: GenerationRequest, answer: _Answer, margin: float) -> Comparison:
    """Score the answer's tokens on the oracle's engine, and compare the log-probabilities."""
    start = len(request.prompt_token_ids)
    tokens = (*request.prompt_token_ids, *(entry.chosen.token_id for entry in answer.entries))
    scoring = SamplingParams(max_tokens=0, logprobs=1)
    scored = replace(request, prompt_token_ids=tokens, sampling=scoring, scored_from=start)
    (expected,) = _run(engine, [scored]).values()
    differences = [
        max(abs(entry.chosen.logprob - score), top.top[0].logprob - score)
        for entry, score, top in zip(answer.entries, expected.scores, expected.entries, strict=True)
    ]
    worst = max(differences) if all(map(math.isfinite, differences)) else math.inf
    return Comparison(request.request_id, len(answer.entries), "nats", worst, margin)


def _engine(base: BaseModel, backend: Backend, adapters: Mapping[str, LoraWeights]) -> Engine:
    size = EngineConfig.block_size
    config = EngineConfig(
        max_model_len=_NUM_BLOCKS * size,
        kv_cache_bytes=_NUM_BLOCKS * backend.bytes_per_block(size),
        adapter_cache_bytes=64 * backend.bytes_per_rank,
    )
    return Engine(backend, TokenBytes(*vocabulary_of(base.tokenizer)), adapters.__getitem__, config)


def _run(engine: Engine, requests: Seq[GenerationRequest]) -> _Answers:
    """Run requests to the end. Raise the error of a request that fails."""
    answers = {(request.request_id, index): _Answer() for request in requests for index in range(request.n)}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        outputs = engine.step()
        for output in outputs:
            answer = answers[output.request_id, output.index]
            answer.text += output.text
            answer.entries += output.logprobs
            answer.scores += output.scores
            if output.error is not None:
                raise output.error
        if not outputs:
            time.sleep(0.0005)  # an adapter is being loaded
    return answers


def _adapter(shape: BaseShape, seed: int, rank: int) -> LoraWeights:
    """Return a random adapter of every module, which changes each output by about a tenth of its input."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in range(shape.num_layers):
        for name in MODULES:
            out, inputs = shape.features[name]
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            b = torch.randn(out, rank, generator=generator) * 0.1 * (inputs / (rank * out)) ** 0.5
            modules[ModuleKey(layer, name)] = LoraModule(a, b, 1.0)
    return LoraWeights(modules)
