"""Calls the native forward: lays out tensors and indices as `serving/step.cpp` reads them.

It does what `SmolLM.forward` does with `PagedAttention` and `LoraBatch`, in one call that holds neither the GIL
nor torch's threads. Weights and caches are bf16; sums and the residual stream are fp32, so that its results lie
closer to fp32's than those of torch's bf16 path. A token's result doesn't depend on what shares its step.
"""

import ctypes
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from server.model.base.config import ModelConfig
from server.model.base.weights import BaseWeights
from server.model.lora_batch import TokenRun
from server.model.native.abi import (
    PHASES,
    TILE,
    LoraModule,
    LoraPart,
    LoraPool,
    LoraSegment,
    ServeRun,
    ServeStep,
    call,
    columns,
    take_phases,
)
from server.model.native.base import check_base, create
from server.model.native.sampling import Choices, SampleTable
from server.model.native.team_size import TeamSize
from server.model.ops.norms import rotary_table
from server.model.rank_rows import Placement, RankRows
from server.model.row_layout import GROUPS, RowFormat

Ints = npt.NDArray[np.int64]
_GROUPS = tuple(GROUPS)
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


ROW_FORMAT = RowFormat(torch.bfloat16, torch.bfloat16, TILE)
"""How the native forward wants rank rows."""


class NativeLora:
    """Where the adapters of one flat batch lie: what `LoraBatch` is to the torch path."""

    def __init__(self, rows: RankRows, runs: Sequence[TokenRun]) -> None:
        """`runs` in order of their tokens; tokens outside them have no adapter."""
        self._rows = rows  # read where they lie
        modules: list[tuple[int, ...]] = []
        parts: dict[str, list[tuple[int, ...]]] = {group: [] for group in _GROUPS}
        weights: list[float] = []
        segments: list[tuple[int, ...]] = []
        known: dict[tuple[int, str], tuple[int, ...]] = {}
        for run in runs:
            segments.append((run.start, run.stop, len(weights), len(run.parts)))
            for placement, weight in run.parts:
                weights.append(weight)
                for group in _GROUPS:
                    key = (id(placement), group)
                    if key not in known:
                        known[key] = _describe(rows, placement, group, modules)
                    parts[group].append(known[key])
        self.modules = _table(modules, LoraModule)
        self.segments = _table(segments, LoraSegment)
        self.weights = np.array(weights, np.float64)
        self._parts = [_table(parts[group], LoraPart) for group in _GROUPS]
        self.pools = (LoraPool * len(_GROUPS))()
        self.tables = {
            "pools": ctypes.addressof(self.pools),
            "modules": self.modules.ctypes.data,
            "segments": self.segments.ctypes.data,
            "weights": self.weights.ctypes.data,
            "num_modules": len(self.modules),
            "num_segments": len(self.segments),
            "num_parts": len(self.weights),
        }
        """What of a ServeStep says so."""
        for index, group in enumerate(_GROUPS):
            a, b = rows.a[group], rows.b[group]
            if rows.format != ROW_FORMAT or not (a.is_contiguous() and b.is_contiguous()):
                raise ValueError("rank rows must be contiguous and as ROW_FORMAT has them")
            self.pools[index] = LoraPool(
                a.data_ptr(),
                b.data_ptr(),
                rows.shape.num_layers,
                rows.num_rows(group),
                rows.num_units(group) * rows.layouts[group].unit,
                rows.layouts[group].in_features,
                self._parts[index].ctypes.data,
            )


class StepTables(NamedTuple):
    """The tokens of a step, and where their sequences' keys and values lie.

    Caches are (num_blocks, layers, block_size, kv_heads, head_dim). A run is its first token, the one after its
    last, the position of its first, where its sequence's block table starts in `blocks`, and of how many of its
    last tokens the hidden states are wanted.
    """

    token_ids: Ints  # (tokens,)
    runs: Ints  # (runs, 5)
    blocks: npt.NDArray[np.int32]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    lora: NativeLora


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
        adapts: bool = False,
    ) -> None:
        """Pack the weights. Raise NativeUnavailable for a base that native code doesn't cover, and MemoryError.

        A step is computed by `num_threads`, or, if it `adapts`, by fewer of them while fewer are faster.
        """
        check_base(config, weights)
        self._library = library
        self._team_size = TeamSize(num_threads) if adapts and num_threads > 1 else None
        self.config = config
        self._weights = weights  # some are read where they lie
        self._read: tuple[object, ...] = ()  # as is this, of a step
        self._caches: tuple[torch.Tensor | None, torch.Tensor | None] = None, None  # that were checked
        self._rotary = rotary_table(max_positions, config.head_dim, config.rope_theta)
        self._model = create(library.smolora_create, config, weights, self._rotary, num_threads)
        # Not at the process' end: a step might still be running in it.
        weakref.finalize(self, library.smolora_destroy, self._model).atexit = False

    def forward(self, tables: StepTables) -> torch.Tensor:
        """Final hidden states (wanted, hidden), bf16; all tokens' keys and values are put into the caches.

        Raises ValueError where anything of it would be read or written outside of what is there, and MemoryError;
        the model can be used on after either.
        """
        step, num_tokens = self._step(tables), tables.token_ids.size
        num_wanted = min(int(tables.runs[:, -1].clip(0, num_tokens).sum()), num_tokens)
        hidden = torch.empty(num_wanted, self.config.hidden_size, dtype=torch.bfloat16)
        step.hidden = hidden.data_ptr()
        self._compute(self._library.smolora_forward, step)
        return hidden

    def draw(self, tables: StepTables, table: SampleTable) -> Choices:
        """The next token behind each token whose hidden state is wanted: `forward` and `sample` in one call."""
        step = self._step(tables)
        sampling, choices = table.step()
        self._compute(self._library.smolora_draw, step, ctypes.addressof(sampling))
        return choices

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits (rows, vocab) of the chosen rows of `forward`'s answer, hidden (rows, hidden)."""
        hidden = self._rows(hidden, torch.bfloat16, self.config.hidden_size, "hidden states")
        logits = torch.empty(hidden.shape[0], self.config.vocab_size)
        call(self._library.smolora_logits, self._model, hidden.data_ptr(), hidden.shape[0], logits.data_ptr())
        return logits

    def sample(self, given: torch.Tensor, table: SampleTable) -> Choices:
        """The next token of each row: of `forward`'s answer, bf16 (rows, hidden), or of logits, fp32 (rows, vocab)
        and contiguous, which are overwritten. Raises ValueError and MemoryError as `forward` does."""
        if given.shape[:1] != (len(table),):
            raise ValueError(f"a table of {len(table)} rows for {given.shape[:1]}")
        if given.dtype is torch.float32:
            logits = self._rows(given, torch.float32, self.config.vocab_size, "logits")
            step, choices = table.step(logits=logits.data_ptr())
        else:
            hidden = self._rows(given, torch.bfloat16, self.config.hidden_size, "hidden states")
            step, choices = table.step(hidden=hidden.data_ptr())
        call(self._library.smolora_sample, self._model, ctypes.addressof(step))
        return choices

    def take_phases(self, *, count: bool = True) -> dict[str, float]:
        """Seconds that each of PHASES took since the last call, as the thread that calls saw it; from now on they
        are counted, or not, as they aren't before the first call. What Python does stands in none."""
        return take_phases(self._library.smolora_phases, self._model, PHASES, count)

    def _compute(self, entry: Callable[..., int], step: ServeStep, *more: int) -> None:
        """Call an entry that computes a step, with the team that is the fastest at present."""
        if self._team_size is None:
            call(entry, self._model, ctypes.addressof(step), *more)
            return
        step.num_threads = self._team_size.choose(step.num_tokens)
        begun, begun_working = time.perf_counter(), time.process_time()
        call(entry, self._model, ctypes.addressof(step), *more)
        seconds, worked = time.perf_counter() - begun, time.process_time() - begun_working
        context = step.num_table_blocks * step.block_size // max(step.num_runs, 1)  # of a sequence, on average
        num_positions = step.num_tokens * context
        self._team_size.observe(step.num_threads, step.num_tokens, num_positions, seconds, worked)

    def _step(self, tables: StepTables) -> ServeStep:
        """A step as native code reads it; what it points to stays until the next one is made."""
        k_cache, v_cache, lora = tables.k_cache, tables.v_cache, tables.lora
        token_ids, runs, blocks = map(np.ascontiguousarray, tables[:3])
        if token_ids.dtype != np.int64 or runs.dtype != np.int64 or blocks.dtype != np.int32:
            raise ValueError("token ids and runs must be int64, and blocks int32")
        if runs.ndim != 2 or runs.shape[1] != columns(ServeRun):
            raise ValueError(f"runs must be of {columns(ServeRun)} numbers each")
        self._check_caches(k_cache, v_cache)
        self._read = (token_ids, runs, blocks, lora)
        return ServeStep(
            num_tokens=token_ids.size,
            num_runs=len(runs),
            token_ids=token_ids.ctypes.data,
            runs=runs.ctypes.data,
            blocks=blocks.ctypes.data,
            num_table_blocks=blocks.size,
            k=k_cache.data_ptr(),
            v=v_cache.data_ptr(),
            num_blocks=k_cache.shape[0],
            block_size=k_cache.shape[2],
            **lora.tables,
        )

    @staticmethod
    def _rows(tensor: torch.Tensor, dtype: torch.dtype, size: int, what: str) -> torch.Tensor:
        if tensor.dtype is not dtype or tensor.ndim != 2 or tensor.shape[1] != size:
            raise ValueError(f"{what} must be {_NAMES[dtype]}, of shape (rows, {size})")
        return tensor.contiguous()

    def _check_caches(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        if k_cache is self._caches[0] and v_cache is self._caches[1]:  # as in each step of a server
            return
        self._check_cache(k_cache)
        self._check_cache(v_cache)
        if k_cache.shape != v_cache.shape:
            raise ValueError("keys and values must have caches of one shape")
        self._caches = k_cache, v_cache

    def _check_cache(self, cache: torch.Tensor) -> None:
        config = self.config
        shape = (*cache.shape[:1], config.num_layers, *cache.shape[2:3], config.num_kv_heads, config.head_dim)
        if cache.dtype is not torch.bfloat16 or cache.shape != shape or not cache.is_contiguous():
            raise ValueError(
                f"a cache must be bf16, contiguous, and of {config.num_layers} layers, {config.num_kv_heads} kv "
                f"heads and a head_dim of {config.head_dim}"
            )


def _describe(rows: RankRows, placement: Placement, group: str, modules: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The part of one adapter in a group; its modules are put at the end of `modules`."""
    run = placement.get(group)
    if run is None:
        return (0,) * columns(LoraPart)
    first = len(modules)
    unit = rows.layouts[group].unit
    modules += [
        (module.rank, module.row, module.unit * unit, module.out_start, module.out_features)
        for module in run.rows.modules
    ]
    return (
        run.first_row,
        run.rows.num_rows,
        first,
        len(run.rows.modules),
        run.first_unit * unit,
        run.rows.num_units * unit,
    )


def _table(rows: Sequence[tuple[int, ...]], structure: type[ctypes.Structure]) -> Ints:
    """An array of the structure, all of whose fields are int64."""
    return np.array(rows, np.int64).reshape(-1, columns(structure))
