"""Rows for the sampler, and the filters of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.request import SamplingParams
from server.engine.sampling import LogitsRow
from server.engine.sequence import TokenCounts

VOCAB = 1000


def row(
    *, index: int = 0, position: int = 5, token_ids: Sequence[int] = (1,), seed: int = 0, **params: Any
) -> LogitsRow:
    asked: dict[str, Any] = {"temperature": 1.0, **params}
    counts = TokenCounts(token_ids, 0)
    return LogitsRow(SamplingParams(seed=seed, **asked), index, position, counts)


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def kept_by_transformers(logits: torch.Tensor, one: LogitsRow) -> set[int]:
    params = one.params
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    scores = warpers(torch.LongTensor([[0]]), logits[None].clone())
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())
