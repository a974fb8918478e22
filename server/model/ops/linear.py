"""The product with a frozen matrix W, and the low-rank products of adapters: y = W x + ((x · A_rowsᵀ) ∘ gates) ·
B_rows.

On a CPU with bf16 arithmetic, oneDNN spends much of a small product on reordering W. `Linear` reorders W once,
which makes a decode step's products about 1.5 times as fast. Inference uses the packed copy. Training uses the
plain matrix, which autograd can differentiate through.

The rows are those of all adapters in memory, and `gates` has each token's weight for each row: that of the row's
adapter, or 0 if the token doesn't use it. `add_dense` multiplies every token by every row; tests compare other
results with it. Serving multiplies only by the rows in use: `shrink_block` multiplies successive tokens by one
adapter's rows, and `shrink_sampled` multiplies given (token, row) pairs, for tokens that share their adapters with
few others. All are differentiable. For 32 tokens of 32 adapters on 2 cores (AVX-512), `shrink_sampled` takes a
quarter of the time of `add_dense`. It takes half the time of a batched product over gathered rows, since it copies
nothing.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

_PACK_FOR_TOKENS = 32  # the packed layout is tuned for this number of rows, and correct for any


class Linear:
    """The product y = x Wᵀ with a frozen W (out, in); x (tokens, in) and y (tokens, out) have W's dtype."""

    def __init__(self, weight: torch.Tensor, *, pack: bool = False) -> None:
        self.weight = weight
        self._packed = _pack(weight) if pack and can_pack(weight) else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None and not torch.is_grad_enabled():
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
            return y
        return F.linear(x, self.weight)


def can_pack(weight: torch.Tensor) -> bool:
    """Return whether the weight, torch and the CPU allow packing. Packing needs bf16 on a CPU."""
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_FOR_TOKENS)
    return packed


def add_dense(
    y: torch.Tensor, x: torch.Tensor, a_rows: torch.Tensor, b_rows: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """Return y + ((x · a_rowsᵀ) ∘ gates) · b_rows, of y's shape (tokens, out).

    x (tokens, in), a_rows (rows, in), b_rows (rows, out), gates (tokens, rows).
    """
    hidden = F.linear(x.to(a_rows.dtype), a_rows) * gates  # (tokens, rows)
    return y + hidden.to(b_rows.dtype) @ b_rows


def shrink_block(x: torch.Tensor, a_rows: torch.Tensor, weight: float, dtype: torch.dtype) -> torch.Tensor:
    """Return weight · (x · a_rowsᵀ), (tokens, rows) in `dtype`, for x (tokens, in) and a_rows (rows, in)."""
    hidden = F.linear(x.to(a_rows.dtype), a_rows)
    return (hidden if weight == 1.0 else hidden * weight).to(dtype)


@dataclass(frozen=True, eq=False)
class Pairs:
    """(token, row) pairs: token t is in a pair with each of rows[offsets[t] : offsets[t + 1]].

    The rows are indices into a pool of `num_rows` rows.
    """

    offsets: torch.Tensor  # (tokens + 1,)
    rows: torch.Tensor  # (num_pairs,)
    num_rows: int

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Each pair's token (num_pairs,)."""
        tokens = torch.arange(self.offsets.shape[0] - 1, device=self.offsets.device)
        # Given the size, torch needn't wait for a GPU to report it.
        return torch.repeat_interleave(tokens, self.offsets.diff(), output_size=self.rows.shape[0])

    @cached_property
    def csr(self) -> torch.Tensor:
        """A sparse CSR tensor (tokens, num_rows) with an entry of 0 for each pair. Only the positions matter."""
        values = torch.zeros(self.rows.shape[0], device=self.rows.device)
        size = (self.offsets.shape[0] - 1, self.num_rows)
        with warnings.catch_warnings():  # torch announces once that CSR is in beta
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
            return torch.sparse_csr_tensor(self.offsets, self.rows, values, size=size, check_invariants=False)


def shrink_sampled(x: torch.Tensor, a_rows: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return x[token] · a_rows[row] for each of `pairs`, in order: (num_pairs,) of a_rows' dtype.

    x (tokens, in), a_rows (rows, in).
    """
    x = x.to(a_rows.dtype)
    if x.device.type == "cpu" and x.dtype is torch.float32:
        products: torch.Tensor = torch.sparse.sampled_addmm(pairs.csr, x, a_rows.t(), beta=0.0)
        return products.values()
    return (x[pairs.tokens] * a_rows[pairs.rows]).sum(-1)


def expand_sampled(
    hidden: torch.Tensor, b_units: torch.Tensor, unit_index: torch.Tensor, bags: torch.Tensor
) -> torch.Tensor:
    """Return, for each bag j, the sum of hidden[i] · b_units[unit_index[i]] over i ∈ [bags[j], bags[j+1]).

    The result is (num_bags, unit), where unit is the length of a row of b_units.

    hidden (num_entries,) of b_units' dtype, b_units (num_units, unit), unit_index (num_entries,), bags (num_bags +
    1,), from 0 to num_entries. Accumulates in fp32.
    """
    return F.embedding_bag(
        unit_index, b_units, bags, mode="sum", per_sample_weights=hidden, include_last_offset=True
    )
