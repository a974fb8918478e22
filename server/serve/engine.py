"""Build an engine from the settings: load the base, choose the backend, and size the caches.

The default sizes of the key/value cache and the adapter cache depend on the free memory. On a CPU these sizes are
upper bounds, since the system provides memory only when it is first written. If this machine lacks something,
raise StartupError with a message of one line.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from adapters.store.store import AdapterStore
from server.config import Settings
from server.engine.adapter_pool import Load
from server.engine.async_engine import AsyncEngine, Watchdog
from server.engine.backend import Backend, PagedCache
from server.engine.detokenizer import TokenBytes
from server.engine.engine import Engine, EngineConfig
from server.engine.guidance import Guidance
from server.engine.native_backend import NativeBackend
from server.engine.scheduler import SchedulerLimits
from server.engine.self_check import SelfCheck, check, checked
from server.engine.torch_backend import TorchBackend
from server.errors import StartupError
from server.model.base.config import ModelConfig
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel
from server.model.device import empty_cache, is_out_of_memory
from server.model.native.load import load_native
from server.model.packed_adapters import PackedAdapters
from server.model.rank_rows import RowLayout
from server.model.smollm import SmolLM
from server.model.text.tokenizer import tokenizer_json, vocabulary_of
from server.storage.home import Home
from server.system.cgroups import memory_left

_SHARE = 8
"""On a CPU each cache takes at most 1 / _SHARE of the free memory, which other processes need, too."""
_MIN_ADAPTER_BYTES, _MAX_ADAPTER_BYTES = 64 << 20, 8 << 30
_GPU_SEQS = (256, 128, 64)
"""The default numbers of sequences in one batch on a GPU, the largest first. A number fits if a step's tensors
take at most a quarter of the memory that training leaves. If none fits, the default is the CPU's."""
_PROCESS_BYTES = 512 << 20
"""GPU memory of each process besides tensors: its context, and fragmentation."""
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class CacheSizes:
    """The sizes of an engine's caches, in bytes."""

    kv_cache: int
    adapter_cache: int


def cpu_caches(settings: Settings, free: int, one: int, max_num_seqs: int) -> CacheSizes:
    """Return the cache sizes that the settings give, or by default a share of the `free` bytes for each cache.

    `one` is how many bytes the keys and values of one sequence of maximum length take. The default key/value cache
    has room for at least one such sequence, and at most for `max_num_seqs`, which can run at once.
    """
    share = free // _SHARE
    return CacheSizes(
        int(settings.kv_cache_bytes or min(max(share, one), max_num_seqs * one)),
        int(settings.adapter_cache_bytes or min(max(share, _MIN_ADAPTER_BYTES), _MAX_ADAPTER_BYTES)),
    )


def gpu_seqs(settings: Settings, free: int, total: int, step: Callable[[int], int]) -> int:
    """Return the sequences in one batch that the settings give, or by default as many as a GPU's memory allows.

    `step` returns the bytes of a step's tensors for a number of sequences.
    """
    left = _left(settings, free, total)
    fitting = (num for num in _GPU_SEQS if step(num) <= left // 4)
    return settings.max_num_seqs or next(fitting, SchedulerLimits.max_num_seqs)


def gpu_caches(settings: Settings, free: int, total: int, one: int, step: int, max_num_seqs: int) -> CacheSizes:
    """Return the cache sizes that the settings give, or by default parts of a GPU's remaining memory.

    By default the key/value cache gets up to 2/3 of the remaining memory, and the adapter cache gets the rest. To
    get the remaining memory, these are subtracted from the `free` bytes: training's share of the `total`, the
    `step` bytes for a step's tensors, and the overhead of the server's and the workers' processes. `one`, and the
    limits of the key/value cache, are as in `cpu_caches`. Raise StartupError if too little memory is left.
    """
    left = _left(settings, free, total) - step
    most = min(left * 2 // 3, left - _MIN_ADAPTER_BYTES)
    keys_and_values = min(max(most, one), max_num_seqs * one)
    kv_cache = int(settings.kv_cache_bytes or keys_and_values)
    adapters = min(max(left - kv_cache, _MIN_ADAPTER_BYTES), _MAX_ADAPTER_BYTES)
    adapter_cache = int(settings.adapter_cache_bytes or adapters)
    if kv_cache + adapter_cache > left and not (settings.kv_cache_bytes and settings.adapter_cache_bytes):
        raise StartupError(
            f"the GPU has {_mb(free)} free, and {_mb(max(left, 0))} without training's share and a step; "
            f"caches of {_mb(kv_cache)} and {_mb(adapter_cache)} are the least: lower SMOLORA_MAX_MODEL_LEN, "
            "SMOLORA_MAX_NUM_SEQS or SMOLORA_TRAIN_MEMORY, or train elsewhere (SMOLORA_WORKERS=0)"
        )
    return CacheSizes(kv_cache, adapter_cache)


def _left(settings: Settings, free: int, total: int) -> int:
    """Return the `free` bytes of a GPU without training's share and the overhead of all processes."""
    return free - int(settings.training_memory * total) - (1 + settings.workers) * _PROCESS_BYTES


def gpu_share(settings: Settings, total: int) -> float:
    """Return the share of a GPU with `total` bytes of memory that training leaves to the server's tensors."""
    if not settings.workers:
        return 1.0
    return max(0.0, 1 - settings.training_memory - (1 + settings.workers) * _PROCESS_BYTES / total)


def step_bytes(base: ModelConfig, itemsize: int, limits: SchedulerLimits, max_model_len: int) -> int:
    """Return the maximum bytes of a step's tensors on a GPU, as if all were allocated at once.

    The tensors are one layer's keys and values for decodes, padded to the longest sequence, with attention scores;
    the attention bias of a prompt's chunk; the widest activations of all tokens; and logits.
    """
    rows, tokens = limits.max_num_seqs, limits.max_num_seqs + limits.max_prefill_tokens
    gathered = 2 * base.kv_size + 3 * base.num_heads  # per position, with scores, weights and a mask's copy
    activations = 4 * base.hidden_size + 2 * (base.q_size + 2 * base.kv_size) + 5 * base.intermediate_size
    bias = 2 * limits.chunk_size * max_model_len * (base.num_heads // base.num_kv_heads)  # of one prompt's chunk
    logits = 6 * 4 * rows * base.vocab_size  # fp32, sorted, as probabilities, with noise
    return itemsize * (rows * max_model_len * gathered + tokens * activations + bias) + logits


def free_bytes() -> int:
    """Return the machine's free memory, within the limits of the container or service."""
    found = [size for size in (_meminfo(), memory_left()) if size is not None]
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"


def _meminfo(file: Path = _MEMINFO) -> int | None:
    try:
        fields = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


DEFAULT_MAX_MODEL_LEN = 8192

Say = Callable[[str], None]
"""A function that receives a short message before each slow operation."""


def base_directory(settings: Settings, say: Say) -> Path:
    """Return the directory of the converted base. The first call converts it, which is slow."""
    return resolve_base(settings.model, settings.home, settings.base_dir, say)


def guidance_of(base: BaseModel) -> Guidance:
    """Return a cache of grammars for the base's tokenizer."""
    return Guidance(tokenizer_json(base.tokenizer), base.config.vocab_size, tuple(base.config.eos_token_ids))


def make_engine(
    settings: Settings,
    base: BaseModel,
    store: AdapterStore,
    guidance: Guidance,
    say: Say,
    watchdog: Watchdog | None = None,
) -> AsyncEngine:
    """Return an engine that loads adapters from the store. The caller starts it."""
    max_model_len = max_model_len_of(settings, base)
    config = _engine_config(settings, base, max_model_len)
    backend = _backend(settings, base, max_model_len, config.scheduler.max_num_seqs, say)
    token_bytes = TokenBytes(*vocabulary_of(base.tokenizer))
    load: Load = store.load
    if backend.row_format.tile is not None:
        layout = RowLayout(backend.config.shape, backend.row_format)
        load = PackedAdapters(store, layout, settings.min_free_bytes, config.adapter_cache_bytes).load

    def build(wake: Callable[[], None]) -> Engine:
        return Engine(backend, token_bytes, load, config, guidance=guidance, wake=wake)

    return _allocated(
        lambda: AsyncEngine(
            build,
            max_queue=settings.max_queue,
            queue_timeout=settings.queue_timeout,
            watchdog=watchdog,
        ),
        config,
    )


def _backend(settings: Settings, base: BaseModel, max_positions: int, max_num_seqs: int, say: Say) -> Backend:
    """Return the native backend, or the GPU's, if settings, machine and base allow it, or else torch's."""
    if base.device.type == "cuda":
        return _gpu_backend(settings, base, max_positions, max_num_seqs, say)
    native = load_native(base, Home(settings.home).native, max_positions, say) if settings.native else None
    if native is None:
        return _torch_backend(base, max_positions)
    torch.set_num_threads(1)  # torch's threads would spin on cores that native code uses
    return NativeBackend(native)


def self_check(settings: Settings, base: BaseModel, say: Say) -> tuple[Backend, SelfCheck]:
    """Compare the backend that the settings choose with torch's. Return the backend, and what was found."""
    max_model_len = max_model_len_of(settings, base)
    max_num_seqs = settings.max_num_seqs or SchedulerLimits.max_num_seqs
    if base.device.type == "cuda" and _why_no_kernels(settings, base) is None:
        backend = _cuda_backend(base, max_model_len, max_num_seqs)  # not torch in its place if the check fails
    else:
        backend = _backend(settings, base, max_model_len, max_num_seqs, say)
    return backend, check(base, backend, _torch_backend(base, max_model_len), max_model_len)


def _torch_backend(base: BaseModel, max_positions: int) -> Backend:
    return TorchBackend(SmolLM(base.config, base.weights, max_positions=max_positions, pack=True))


def _gpu_backend(settings: Settings, base: BaseModel, max_positions: int, max_num_seqs: int, say: Say) -> Backend:
    """Return the backend in Triton kernels if they can serve the base and answer as torch's, or else torch's."""
    reason = _why_no_kernels(settings, base)
    if reason is not None:
        backend = _torch_backend(base, max_positions)
        if reason:
            say(f"torch serves: {reason}")
            backend.fallbacks.append(f"torch serves: {reason}")
        return backend
    say("compiling the GPU's kernels if they are new here, and comparing their answers with torch's")
    backend = checked(
        base,
        lambda: _cuda_backend(base, max_positions, max_num_seqs),
        lambda: _torch_backend(base, max_positions),
        max_positions,
    )
    empty_cache()
    return backend


def _cuda_backend(base: BaseModel, max_positions: int, max_num_seqs: int) -> Backend:
    from server.engine.cuda_backend import CudaBackend
    from server.engine.cuda_graphs import capture_on_gpu

    return CudaBackend(
        base.config,
        base.weights,
        max_positions=max_positions,
        max_num_seqs=max_num_seqs,
        capture=capture_on_gpu(base.device),
    )


def _why_no_kernels(settings: Settings, base: BaseModel) -> str | None:
    """Return why the Triton kernels can't serve a base on a GPU, or None if they can. Empty: by the settings."""
    if not settings.native:
        return ""
    if base.dtype is not torch.bfloat16:
        return f"the kernels compute in bf16, not in {str(base.dtype).removeprefix('torch.')}"
    if find_spec("triton") is None:
        return "triton isn't installed"
    from server.model.cuda.variants import why_not

    return why_not(base.config)


def _allocated(make: Callable[[], AsyncEngine], config: EngineConfig) -> AsyncEngine:
    """Return `make()`. Raise StartupError if the caches don't fit into memory."""
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise StartupError(
            f"no memory for caches of {config.kv_cache_bytes} and {config.adapter_cache_bytes} bytes: "
            "lower SMOLORA_KV_CACHE_BYTES and SMOLORA_ADAPTER_CACHE_BYTES"
        ) from None


def max_model_len_of(settings: Settings, base: BaseModel) -> int:
    """Return the length limit of a sequence, in tokens. Raise StartupError if this exceeds the base's limit."""
    longest = base.config.max_position_embeddings
    if settings.max_model_len is None:
        return min(longest, DEFAULT_MAX_MODEL_LEN)
    if settings.max_model_len > longest:
        raise StartupError(f"SMOLORA_MAX_MODEL_LEN={settings.max_model_len}: {base.name} ends at {longest} tokens")
    return settings.max_model_len


def _engine_config(settings: Settings, base: BaseModel, max_model_len: int) -> EngineConfig:
    block_size = EngineConfig.block_size
    padded_len = -(-max_model_len // block_size) * block_size
    one = padded_len * kv_bytes_per_token(base)

    def limits_of(num_seqs: int) -> SchedulerLimits:
        return SchedulerLimits.on(base.device.type, num_seqs, settings.prefill_share)

    def step(num_seqs: int) -> int:
        size = step_bytes(base.config, base.dtype.itemsize, limits_of(num_seqs), padded_len)
        return size + (_graph_bytes(base, num_seqs, max_model_len) if has_graphs else 0)

    has_graphs = base.device.type == "cuda" and _why_no_kernels(settings, base) is None
    if base.device.type == "cpu":
        num_seqs = settings.max_num_seqs or SchedulerLimits.max_num_seqs
        sizes = cpu_caches(settings, free_bytes(), one, num_seqs)
    else:
        free, total = torch.cuda.mem_get_info(base.device)
        num_seqs = gpu_seqs(settings, free, total, step)
        sizes = gpu_caches(settings, free, total, one, step(num_seqs), num_seqs)
    return EngineConfig(
        max_model_len=max_model_len,
        kv_cache_bytes=sizes.kv_cache,
        adapter_cache_bytes=sizes.adapter_cache,
        scheduler=limits_of(num_seqs),
    )


def _graph_bytes(base: BaseModel, max_num_seqs: int, max_model_len: int) -> int:
    """Return the bytes of the tensors that CUDA graphs compute in."""
    from server.engine.cuda_graphs import GraphSizes

    itemsize = base.dtype.itemsize
    sizes = GraphSizes.fitting(base.config, itemsize, max_num_seqs, max_model_len, EngineConfig.block_size)
    return 0 if sizes is None else sizes.num_bytes(itemsize)


def kv_bytes_per_token(base: BaseModel) -> int:
    """Return the size of one token's keys and values."""
    return PagedCache.bytes_per_block(base.config, 1, base.dtype)
