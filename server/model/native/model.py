"""The native forward pass for serving: passes a base's weights and a step's tables to `serve.cpp`.

One call computes what `SmolLM.forward` computes with `PagedAttention` and `LoraBatch`. The call releases the GIL,
and uses the native code's own threads. Weights and caches are bf16; sums and the residual stream are fp32, so
results are closer to fp32 results than torch's bf16 results are. A token's result doesn't depend on the other
tokens of its step.
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
from server.model.base.quantized import BLOCK, BLOCK_BYTES, Quantized
from server.model.base.weights import BaseWeights
from server.model.lora_batch import TokenRun
from server.model.native.abi import (
    MAX_GROUP,
    PHASES,
    TILE,
    WEIGHT_TYPES,
    BaseSizes,
    BaseTensor,
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
from server.model.native.build import NativeUnavailable
from server.model.native.sampling import Choices, SampleTable
from server.model.native.team_size import TeamSize
from server.model.ops.norms import rotary_table
from server.model.rank_rows import GROUPS, Placement, RankRows, RowFormat


def create(
    entry: Callable[..., int], config: ModelConfig, weights: BaseWeights, rotary: torch.Tensor, num_threads: int
) -> int:
    """Call `smolora_create` or `smolora_training_create` for a base, and return the new object's address.

    `rotary` is the complete result of `rotary_table`. The caller must keep it and the weights while the object
    exists. Raise MemoryError if memory runs out.
    """
    tensors = dict(weights.tensors())
    names = tensor_names(weights)
    sizes = BaseSizes(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        rotary.shape[1],
        num_threads,
        config.rms_norm_eps,
    )
    table = (BaseTensor * len(names))(*(_tensor(tensors[name], weights.quantized.get(name)) for name in names))
    uses_rotary = (ctypes.c_uint8 * config.num_layers)(
        *(layer not in config.nope_layers for layer in range(config.num_layers))
    )
    created = ctypes.c_void_p()
    call(entry, ctypes.byref(sizes), table, rotary.data_ptr(), uses_rotary, ctypes.byref(created))
    assert created.value is not None
    return created.value


def tensor_names(weights: BaseWeights) -> list[str]:
    """Return all tensors' names in the order of `smolora_create`, with `embed` for a tied output head."""
    names = [name for name, _ in weights.tensors()]
    return names if weights.lm_head is not weights.embed else [*names, "embed"]


def _tensor(values: torch.Tensor, stored: Quantized | None) -> BaseTensor:
    if stored is None:
        return BaseTensor(values.data_ptr(), WEIGHT_TYPES.index("BF16"), None)
    return BaseTensor(values.data_ptr(), WEIGHT_TYPES.index(stored.type), stored.blocks.data_ptr())


def check_base(config: ModelConfig, weights: BaseWeights) -> None:
    """Raise NativeUnavailable if the native code doesn't support the base."""
    if any(tensor.dtype is not torch.bfloat16 or tensor.device.type != "cpu" for _, tensor in weights.tensors()):
        raise NativeUnavailable("it computes only in bf16 on a CPU")
    if any(not tensor.is_contiguous() for _, tensor in weights.tensors()):
        raise NativeUnavailable("it needs contiguous weights")
    for name, stored in weights.quantized.items():
        rows, columns = dict(weights.tensors())[name].shape
        if stored.blocks.shape != (rows, columns // BLOCK * BLOCK_BYTES[stored.type]) or columns % BLOCK:
            raise NativeUnavailable(f"{name} has blocks of another shape than its weights")
    for name, size in (
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("head_dim", config.head_dim),
    ):
        if size % TILE:
            raise NativeUnavailable(f"{name} is no multiple of {TILE}")
    if config.num_heads // config.num_kv_heads > MAX_GROUP:
        raise NativeUnavailable(f"more than {MAX_GROUP} query heads share a kv head")


Ints = npt.NDArray[np.int64]
_GROUPS = tuple(GROUPS)
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


ROW_FORMAT = RowFormat(torch.bfloat16, torch.bfloat16, TILE)
"""The native forward pass's layout of rank rows."""


class NativeLora:
    """The adapters of one flat batch, as tables with addresses for native code. The counterpart of `LoraBatch`."""

    def __init__(self, rows: RankRows, runs: Sequence[TokenRun]) -> None:
        """Take `runs` in order of their tokens. Tokens outside the runs have no adapter."""
        self._rows = rows  # kept, since native code reads them in place
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
        """The fields of a ServeStep that describe adapters."""
        for index, group in enumerate(_GROUPS):
            a, b = rows.a[group], rows.b[group]
            if rows.format != ROW_FORMAT or not (a.is_contiguous() and b.is_contiguous()):
                raise ValueError("rank rows must be contiguous and in ROW_FORMAT")
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
    """A step's tokens, and their sequences' keys and values.

    Caches are (num_blocks, layers, block_size, kv_heads, head_dim). A row of `runs` is a `ServeRun`: the start
    and stop of the tokens of one sequence, the first token's position, the start of the sequence's block table in
    `blocks`, and how many of the last tokens are wanted tokens, whose hidden states are returned.
    """

    token_ids: Ints  # (tokens,)
    runs: Ints  # (runs, 5)
    blocks: npt.NDArray[np.int32]
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    lora: NativeLora


class NativeModel:
    """The native counterpart of `SmolLM` for serving. One thread at a time may call it."""

    def __init__(
        self,
        library: ctypes.CDLL,
        config: ModelConfig,
        weights: BaseWeights,
        *,
        max_positions: int,
        num_threads: int,
        adaptive_threads: bool = False,
    ) -> None:
        """Pack the weights. Raise NativeUnavailable if native code doesn't support the base.

        Raise MemoryError if memory runs out. `num_threads` threads compute a step. With `adaptive_threads`, a step
        uses fewer threads if that is faster.
        """
        check_base(config, weights)
        self._library = library
        self._team_size = TeamSize(num_threads) if adaptive_threads and num_threads > 1 else None
        self.config = config
        self._weights = weights  # kept, since native code reads some in place
        self._read: tuple[object, ...] = ()  # keeps the arrays alive that the last step points to
        self._caches: tuple[torch.Tensor | None, torch.Tensor | None] = None, None  # the last checked ones
        self._rotary = rotary_table(max_positions, config.head_dim, config.rope_theta)
        self._model = create(library.smolora_create, config, weights, self._rotary, num_threads)
        # Not at exit: a step might still be running.
        weakref.finalize(self, library.smolora_destroy, self._model).atexit = False

    def forward(self, tables: StepTables) -> torch.Tensor:
        """Return the wanted tokens' final hidden states (wanted, hidden), bf16.

        All tokens' keys and values are written to the caches. Raise ValueError if the tables would cause an access
        out of bounds, and MemoryError if memory runs out. The model stays usable after either error.
        """
        step, num_tokens = self._step(tables), tables.token_ids.size
        num_wanted = min(int(tables.runs[:, -1].clip(0, num_tokens).sum()), num_tokens)
        hidden = torch.empty(num_wanted, self.config.hidden_size, dtype=torch.bfloat16)
        step.hidden = hidden.data_ptr()
        self._compute(self._library.smolora_forward, step)
        return hidden

    def draw(self, tables: StepTables, table: SampleTable) -> Choices:
        """Return the next token after each wanted token of `tables`: `forward` and `sample` in one call."""
        step = self._step(tables)
        sampling, choices = table.step()
        self._compute(self._library.smolora_draw, step, ctypes.addressof(sampling))
        return choices

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits (rows, vocab) for rows of `forward`'s result, `hidden` (rows, hidden)."""
        hidden = self._rows(hidden, torch.bfloat16, self.config.hidden_size, "hidden states")
        logits = torch.empty(hidden.shape[0], self.config.vocab_size)
        call(self._library.smolora_logits, self._model, hidden.data_ptr(), hidden.shape[0], logits.data_ptr())
        return logits

    def sample(self, given: torch.Tensor, table: SampleTable) -> Choices:
        """Return each row's next token.

        `given` is `forward`'s result, bf16 (rows, hidden), or contiguous fp32 logits (rows, vocab), which are
        overwritten. Raise ValueError and MemoryError as `forward` does.
        """
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
        """Return for each of PHASES how many seconds the calling thread has spent in it since the last call.

        PHASES are the parts of a step in native code, so Python's own time isn't included. Measuring is off at
        first. `count` turns it on or off from now on.
        """
        return take_phases(self._library.smolora_phases, self._model, PHASES, count)

    def _compute(self, entry: Callable[..., int], step: ServeStep, *more: int) -> None:
        """Call a native function that computes a step, with the number of threads that `TeamSize` chooses."""
        if self._team_size is None:
            call(entry, self._model, ctypes.addressof(step), *more)
            return
        step.num_threads = self._team_size.choose(step.num_tokens)
        begun, begun_working = time.perf_counter(), time.process_time()
        call(entry, self._model, ctypes.addressof(step), *more)
        seconds, worked = time.perf_counter() - begun, time.process_time() - begun_working
        context = step.num_table_blocks * step.block_size // max(step.num_runs, 1)  # mean per sequence
        num_positions = step.num_tokens * context
        self._team_size.observe(step.num_threads, step.num_tokens, num_positions, seconds, worked)

    def _step(self, tables: StepTables) -> ServeStep:
        """Return a step for native code. The arrays that it points to are kept until the next call."""
        k_cache, v_cache, lora = tables.k_cache, tables.v_cache, tables.lora
        token_ids, runs, blocks = map(np.ascontiguousarray, tables[:3])
        if token_ids.dtype != np.int64 or runs.dtype != np.int64 or blocks.dtype != np.int32:
            raise ValueError("token ids and runs must be int64, and blocks int32")
        if runs.ndim != 2 or runs.shape[1] != columns(ServeRun):
            raise ValueError(f"runs must have {columns(ServeRun)} numbers each")
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
        if k_cache is self._caches[0] and v_cache is self._caches[1]:  # a server always has the same ones
            return
        self._check_cache(k_cache)
        self._check_cache(v_cache)
        if k_cache.shape != v_cache.shape:
            raise ValueError("caches of keys and of values must have one shape")
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
    """Return one adapter's LoraPart for a group of modules, and append its LoraModules to `modules`."""
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
    """Return the rows as an array whose columns are the structure's fields, which all are int64."""
    return np.array(rows, np.int64).reshape(-1, columns(structure))
