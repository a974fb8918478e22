"""Calls the native forward: lays out tensors and indices as `step.cpp` reads them.

It does what `SmolLM.forward` does with `PagedAttention` and `LoraBatch`, in one call that holds neither the GIL
nor torch's threads. Weights and caches are bf16; sums and the residual stream are fp32, so that its results lie
closer to fp32's than those of torch's bf16 path. A token's result doesn't depend on what shares its step.
"""

import ctypes
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from server.model.config import ModelConfig
from server.model.lora_batch import TokenRun
from server.model.native.base import BaseArguments, check_base
from server.model.ops.norms import rotary_table
from server.model.rank_rows import GROUPS, Placement, RankRows
from server.model.weights import BaseWeights

Ints = npt.NDArray[np.int64]
_GROUPS = tuple(GROUPS)


class _Pool(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("a_stride", "b_stride", "inputs")),
        ("parts", ctypes.c_void_p),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_runs", "block_size", "num_lora_runs")),
        *((name, ctypes.c_void_p) for name in ("token_ids", "runs", "blocks", "k", "v")),
        ("cache_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("pools", "modules", "lora_runs", "lora_weights", "hidden")),
    )


class NativeLora:
    """Where the adapters of one flat batch lie: what `LoraBatch` is to the torch path."""

    def __init__(self, rows: RankRows, runs: Sequence[TokenRun]) -> None:
        """`runs` in order of their tokens; tokens outside them have no adapter."""
        modules: list[tuple[int, ...]] = []
        parts: dict[str, list[tuple[int, ...]]] = {group: [] for group in _GROUPS}
        weights: list[float] = []
        lora_runs: list[tuple[int, ...]] = []
        known: dict[tuple[int, str], tuple[int, ...]] = {}
        for run in runs:
            lora_runs.append((run.start, run.stop, len(weights), len(run.parts)))
            for placement, weight in run.parts:
                weights.append(weight)
                for group in _GROUPS:
                    key = (id(placement), group)
                    if key not in known:
                        known[key] = _describe(rows, placement, group, modules)
                    parts[group].append(known[key])
        self.num_runs = len(lora_runs)
        self.modules = _table(modules, 5)
        self.runs = _table(lora_runs, 4)
        self.weights = np.array(weights, np.float64)
        self._parts = [_table(parts[group], 4) for group in _GROUPS]
        self.pools = (_Pool * len(_GROUPS))()
        for index, group in enumerate(_GROUPS):
            a, b = rows.a[group], rows.b[group]
            self.pools[index] = _Pool(
                a.data_ptr(),
                b.data_ptr(),
                a.stride(0),
                b.stride(0),
                a.shape[2],
                self._parts[index].ctypes.data,
            )


class NativeModel:
    """The native form of one base: `SmolLM`'s, for serving. Called by one thread at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        weights: BaseWeights,
        *,
        max_positions: int,
        num_threads: int,
    ) -> None:
        """Packs the weights. Raises NativeUnavailable for a base that it does not cover, and MemoryError."""
        check_base(config, weights)
        self._library = library
        self._vocab_size = config.vocab_size
        self._hidden_size = config.hidden_size
        self._weights = weights  # some are read where they lie
        self._rotary = rotary_table(max_positions, config.head_dim, config.rope_theta)
        arguments = BaseArguments(config, weights, self._rotary, num_threads)
        self._model = library.smolora_create(*arguments.addresses)
        if not self._model:
            raise MemoryError("no memory for the packed weights")
        # Not at the process' end: a step might still be running in it.
        weakref.finalize(self, library.smolora_destroy, self._model).atexit = False

    def forward(
        self,
        token_ids: Ints,
        runs: Ints,
        blocks: npt.NDArray[np.int32],
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        lora: NativeLora,
    ) -> torch.Tensor:
        """Final hidden states (tokens, hidden), bf16; the tokens' keys and values are put into the caches.

        token_ids (tokens,); runs (runs, 4): a run's first token, the one after its last, the position of its
        first, and where its sequence's block table starts in `blocks`; caches (layers, num_blocks, block_size,
        kv_heads, head_dim).
        """
        hidden = torch.empty(len(token_ids), self._hidden_size, dtype=torch.bfloat16)
        step = _Step(
            len(token_ids),
            len(runs),
            k_cache.shape[2],
            lora.num_runs,
            token_ids.ctypes.data,
            runs.ctypes.data,
            blocks.ctypes.data,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            k_cache.stride(0),
            ctypes.addressof(lora.pools),
            lora.modules.ctypes.data,
            lora.runs.ctypes.data,
            lora.weights.ctypes.data,
            hidden.data_ptr(),
        )
        self._library.smolora_forward(self._model, ctypes.addressof(step))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits (rows, vocab) of the chosen rows of `forward`'s answer, hidden (rows, hidden)."""
        hidden = hidden.contiguous()
        logits = torch.empty(hidden.shape[0], self._vocab_size)
        self._library.smolora_logits(self._model, hidden.data_ptr(), hidden.shape[0], logits.data_ptr())
        return logits


def _describe(rows: RankRows, placement: Placement, group: str, modules: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The part of one adapter in a group; its modules are put at the end of `modules`."""
    run = placement.get(group)
    if run is None:
        return (0, 0, 0, 0)
    first = len(modules)
    unit = rows.layouts[group].unit
    modules += [
        (module.rank, module.row, (run.first_unit + module.unit) * unit, module.out_start, module.out_features)
        for module in run.rows.modules
    ]
    return (run.first_row, run.rows.num_rows, first, len(run.rows.modules))


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> Ints:
    return np.array(rows, np.int64).reshape(-1, columns)
