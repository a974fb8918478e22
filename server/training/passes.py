"""Random streams that are named, not continued: what is drawn depends on the name alone, on no history.

Dropout of the inputs of A, from a random stream for each row of the data.

The features that are dropped depend on the row's stream, the layer and the group alone: neither on what the row is
packed with, nor on the steps before. Modules that read the same input share what is dropped (PEFT draws for each).

What one forward and backward pass is over: whole examples, one after the other.

Attention of a training batch: many short texts in one flat batch, none of which sees another.

Texts lie one after the other; each attends causally to itself alone (a block-diagonal mask) and counts its
positions from 0, so that a text's loss is the same whatever it is packed with.

The batch is cut into tiles of queries, and each tile meets the keys from the beginning of its first text to its
own end: few products of a good size for texts of any lengths, with little that the mask takes away again. The
backward pass computes a tile's weights once more, so that nothing is kept but q, k and v.

The loss over the tokens that count, without ever holding all their logits.

Logits of a vocabulary of 49,152 take 200 KB a token in fp32. `cross_entropy_sum` makes them for `CHUNK` tokens at
a time and takes their gradient at once, so that what the backward pass keeps has the size of the hidden states.

Forward, loss and backward of a micro-batch: the protocol of all passes, and the pass in torch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from server.model.device import ints_beside, to_device, torch_on
from server.model.ops.gradients import apply
from server.model.smollm import Adapters, SmolLM
from server.training.encoding import Example


def stream(*name: int | str) -> torch.Generator:
    """A fresh CPU generator for `name`, such as ("init", seed, layer, module)."""
    data = "|".join(map(str, name)).encode()
    seed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(seed)


Stream = tuple[int | str, ...]


class Dropout:
    """For one micro-batch: texts of `lengths` tokens, in order, each with its stream's name, as (seed, step, row).

    `factor` makes up for what is dropped (inverted dropout: Srivastava et al. 2014).
    """

    def __init__(self, probability: float, streams: Sequence[Stream], lengths: Sequence[int]) -> None:
        self.factor = 1 / (1 - probability)
        self._keep = 1 - probability
        self._texts = list(zip(streams, lengths, strict=True))

    def kept(self, layer: int, group: str, x: torch.Tensor) -> torch.Tensor:
        """Which features of a group's inputs stay: a mask (tokens, in), where x (·, in) lies.

        The same every time that it is asked for.
        """
        masks = [
            torch.empty(length, x.shape[1]).bernoulli_(
                self._keep, generator=stream("dropout", *name, layer, group)
            )
            for name, length in self._texts
        ]
        return to_device(torch.cat(masks).bool(), x.device)


def max_tokens(device: torch.device) -> int:
    """At most so many tokens are a micro-batch, unless one example is longer: more cost memory, not time."""
    return 512 if device.type == "cpu" else 4096


@dataclass(frozen=True)
class MicroBatch:
    """All examples' tokens, one after the other, and which of them are predicted.

    `targets[i]` is predicted from the hidden state at `before[i]`, the place before it.
    """

    token_ids: Sequence[int]
    lengths: Sequence[int]  # of the examples
    before: Sequence[int]  # places in token_ids, all different
    targets: Sequence[int]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        before: list[int] = []
        targets: list[int] = []
        start = 0
        for example in examples:
            for place in range(1, len(example.token_ids)):
                if example.is_target[place]:
                    before.append(start + place - 1)
                    targets.append(example.token_ids[place])
            start += len(example.token_ids)
        token_ids = [token for example in examples for token in example.token_ids]
        return cls(token_ids, [len(example.token_ids) for example in examples], before, targets)


TILE, GPU_TILE = 128, 1024
"""Queries of a tile; twice as many where those are all. A GPU computes what the mask takes away sooner than it
begins with another tile."""


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some queries and all the keys that any of them sees."""

    queries: slice
    keys: slice
    bias: torch.Tensor  # (queries, keys): -inf where the key is another text's or comes later, else 0


class PackedAttention:
    """`smollm.Attention` for texts of `lengths` tokens (1 or more), in order, in one flat batch.

    Differentiable once. `positions` (tokens,) are what the forward pass takes beside it.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        assert all(length > 0 for length in lengths)
        sizes = torch.tensor(lengths)
        first_of_text = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # of each token's
        starts = to_device(first_of_text, device)
        place = torch.arange(len(starts), device=device)
        self.positions = place - starts
        size = TILE if device.type == "cpu" else GPU_TILE
        size = size if len(place) > 2 * size else len(place)  # so little is done fastest at once
        self._tiles = [
            self._tile(slice(first, min(first + size, len(place))), int(first_of_text[first]), place, starts)
            for first in range(0, len(place), size)
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (tokens, heads, head_dim), k, v (tokens, kv_heads, head_dim); like q."""
        return apply(_Attend, q, k, v, self._tiles)

    @staticmethod
    def _tile(queries: slice, first_key: int, place: torch.Tensor, starts: torch.Tensor) -> _Tile:
        keys = slice(first_key, queries.stop)
        unseen = (place[keys] < starts[queries, None]) | (place[keys] > place[queries, None])
        bias = torch.zeros(unseen.shape, device=place.device).masked_fill_(unseen, float("-inf"))
        return _Tile(queries, keys, bias)


class _Attend(torch.autograd.Function):
    """softmax(q kᵀ / √head_dim) v over the tiles; the heads of a group are further queries of its kv head.

    What divides the scores is in k from the beginning.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tiles: Sequence[_Tile],
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.tiles = tiles
        k, v = _by_head(k) * q.shape[-1] ** -0.5, _by_head(v)
        out = q.new_empty(q.shape)
        for tile in tiles:
            weights = _weights(_grouped(q[tile.queries], k.shape[0]), k, tile)
            _ungroup(torch.bmm(weights, v[:, tile.keys]), out[tile.queries])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:  # noqa: ANN401
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        k, v = _by_head(k) * scale, _by_head(v)
        dq = q.new_empty(q.shape)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for tile in ctx.tiles:
            q_tile, d_tile = _grouped(q[tile.queries], k.shape[0]), _grouped(d_out[tile.queries], k.shape[0])
            weights = _weights(q_tile, k, tile)
            d_weights = torch.bmm(d_tile, v[:, tile.keys].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dv[:, tile.keys] += torch.bmm(weights.transpose(1, 2), d_tile)
            dk[:, tile.keys] += torch.bmm(d_scores.transpose(1, 2), q_tile)
            _ungroup(torch.bmm(d_scores, k[:, tile.keys]), dq[tile.queries])
        return dq, (dk * scale).transpose(0, 1).to(q.dtype), dv.transpose(0, 1).to(q.dtype), None


def _weights(q: torch.Tensor, k: torch.Tensor, tile: _Tile) -> torch.Tensor:
    """The softmax of q kᵀ, for q (kv_heads, heads of one * queries, head_dim): (kv_heads, …, the tile's keys)."""
    scores = torch.bmm(q, k[:, tile.keys].transpose(1, 2))
    scores.view(-1, *tile.bias.shape).add_(tile.bias.to(scores.dtype))
    return scores.softmax(-1)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """(tokens, kv_heads, head_dim) as (kv_heads, tokens, head_dim), each head's rows one after the other."""
    return x.transpose(0, 1).contiguous()


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """x (queries, heads, head_dim) as (kv_heads, heads of one * queries, head_dim)."""
    queries, heads, dim = x.shape
    return x.view(queries, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)


def _ungroup(x: torch.Tensor, out: torch.Tensor) -> None:
    """The inverse of `_grouped`, written into out (queries, heads, head_dim)."""
    queries, heads, dim = out.shape
    out.copy_(x.view(heads, queries, dim).transpose(0, 1))


CHUNK = 256
"""Tokens whose logits exist at one time."""


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            log_probs = F.linear(hidden[rows], head).float().log_softmax(-1)  # (chunk, vocab)
            chosen = targets[rows, None]
            loss -= log_probs.gather(1, chosen).sum()
            d_logits = log_probs.exp_()
            d_logits.scatter_add_(1, chosen, d_logits.new_full(chosen.shape, -1.0))  # softmax - one-hot
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[rows] = d_logits @ head
            if d_head is not None:
                d_head += d_logits.t() @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_head)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:  # noqa: ANN401
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), None if d_head is None else d_head * d_loss, None


def cross_entropy_sum(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy (nats, an fp32 scalar) of targets (tokens,) under softmax(hidden · headᵀ).

    hidden (tokens, hidden size), head (vocab, hidden size). Differentiable once, in hidden and head.
    """
    return apply(_CrossEntropySum, hidden, head, targets)


@dataclass(frozen=True)
class Measured:
    """What a model makes of the targets of a micro-batch."""

    losses: Sequence[float]  # nats, of each
    num_right: int  # that are the likeliest token


class Pass(Protocol):
    """Computes gradients and losses of what is trained. `TorchPass` is the oracle of the others."""

    @property
    def computed_by(self) -> str:
        """The code that does it: equal ones make equal bytes on the same machine."""
        ...

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Final hidden states (tokens, hidden)."""
        ...

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        """Add `factor` times the gradients of the batch's summed loss to `gradients`; that loss, in nats."""
        ...

    def measure(self, batch: MicroBatch) -> Measured:
        """Losses alone."""
        ...


class TorchPass:
    """By torch's autograd, on any device. `collect` takes what a backward pass left in the leaves."""

    def __init__(self, model: SmolLM, adapters: Adapters, collect: Callable[[], None]) -> None:
        self._model = model
        self._adapters = adapters
        self._collect = collect

    @property
    def computed_by(self) -> str:
        return torch_on(self._model.device)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        model = self._model
        attention = PackedAttention(batch.lengths, model.device)
        return model.forward(
            ints_beside(model.embed, batch.token_ids), attention.positions, attention, self._adapters
        )

    def accumulate(self, batch: MicroBatch, factor: float) -> float:
        hidden = self.forward(batch)
        loss = cross_entropy_sum(
            hidden.index_select(0, ints_beside(hidden, batch.before)),
            self._model.lm_head.weight,
            ints_beside(hidden, batch.targets),
        )
        torch.autograd.backward(loss * factor)
        self._collect()
        return float(loss.detach())

    @torch.no_grad()
    def measure(self, batch: MicroBatch) -> Measured:
        hidden = self.forward(batch)
        hidden = hidden.index_select(0, ints_beside(hidden, batch.before))  # (targets, hidden)
        targets = ints_beside(hidden, batch.targets)
        losses, are_right = [], []
        for rows, chosen in zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True):
            logits = self._model.logits(rows)  # (chunk, vocab), fp32
            losses.append(F.cross_entropy(logits, chosen, reduction="none"))
            are_right.append((logits.argmax(-1) == chosen).sum())
        return Measured(torch.cat(losses).tolist(), int(torch.stack(are_right).sum()))
