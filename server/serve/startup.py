"""Builds everything that the app works with, from the settings; slow where a base is converted the first time.

Whatever is missing on this machine raises StartupError, in one line.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from adapters.catalog.catalog import Catalog
from adapters.catalog.digests import NamesByDigest
from adapters.library import Library
from adapters.store.store import AdapterStore
from server.access.access import open_access
from server.access.principal import EVERYBODY
from server.api.deps import Services
from server.api.train.estimate import Estimator
from server.api.train.feeds import JobFeeds
from server.api.train.submission import Submissions
from server.config import Settings
from server.database import commits_of, connect, described, records_of
from server.engine.async_engine import AsyncEngine
from server.engine.backend import Backend, NativeBackend, TorchBackend
from server.engine.detokenizer import TokenBytes
from server.engine.engine import Engine, EngineConfig
from server.engine.paged_attention import PagedCache
from server.engine.scheduler import SchedulerLimits
from server.engine.structured.guidance import Guidance
from server.engine.watching.watchdog import Watchdog
from server.errors import StartupError
from server.home import Home
from server.metrics.gateway import GatewayCollector
from server.metrics.home import HomeCollector
from server.metrics.metrics import Metrics
from server.metrics.process import ServerCollector
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.device import choose_device, training_dtype
from server.model.gpu import is_out_of_memory, limit_memory, room_for
from server.model.native.load import load_native
from server.model.smollm import SmolLM
from server.model.text.chat import PromptEncoder
from server.model.text.vocabulary import tokenizer_json, vocabulary_of
from server.serve.sizing import cpu_caches, free_bytes, gpu_caches, gpu_share, step_bytes
from server.tracing.spans import open_tracer
from server.training.data.datasets import DatasetStore
from server.training.data.encoding import RowEncoder
from server.training.data.files import FileStore, RowSources
from server.training.queue.jobs import Jobs

DEFAULT_MAX_MODEL_LEN = 8192


def build(settings: Settings, say: Callable[[str], None], watchdog: Watchdog | None = None) -> Services:
    """The services, with an engine that isn't started. `say` is told before each thing that takes a while."""
    device, dtype = choose_device(settings.device, settings.dtype)
    if device.type == "cuda":
        with room_for("another process", device):
            limit_memory(device, gpu_share(settings, torch.cuda.mem_get_info(device)[1]))
    database = connect(settings.home, url=settings.database)
    home, commits = Home(settings.home), commits_of(database, settings.home)
    access = open_access(database, home.keyed, commits, settings.api_keys, settings.allow_anonymous)
    directory = resolve_base(settings.model, settings.home, settings.base_dir, say)
    say(f"the database is {described(database)}")
    say(f"loading {settings.model} on {device} in {str(dtype).removeprefix('torch.')}")
    base = load_base(directory, dtype, device)
    store = AdapterStore(home.adapters)
    jobs = Jobs(database)
    catalog = Catalog(database, records_of(database, home.adapters), EVERYBODY.viewpoint)
    library = Library(catalog, store, base.config.shape, base.name, jobs.in_use, base.digest)
    for line in library.recover(jobs.is_known).lines():
        say(line)
    for project in home.projects():
        DatasetStore(home.datasets(project)).clean()
        FileStore(home.files(project)).clean()
    datasets = DatasetStore(home.datasets(EVERYBODY.project))
    files = FileStore(home.files(EVERYBODY.project))
    encoder = PromptEncoder(base.tokenizer)
    rows = RowEncoder(encoder, _end_token(base), base.config.eos_token_ids)
    longest = base.config.max_position_embeddings

    max_model_len = _max_model_len(settings, base)
    config = _engine_config(settings, base, max_model_len)
    backend = _backend(settings, base, [directory / "native", home.native], max_model_len, say)
    token_bytes = TokenBytes(*vocabulary_of(base.tokenizer))

    vocab_size, eos = base.config.vocab_size, tuple(base.config.eos_token_ids)
    guidance = Guidance(tokenizer_json(base.tokenizer), vocab_size, eos)

    def build_engine(wake: Callable[[], None]) -> Engine:
        return Engine(backend, token_bytes, store.load, config, guidance=guidance, wake=wake)

    engine = _allocated(
        lambda: AsyncEngine(
            build_engine,
            max_queue=settings.max_queue,
            queue_timeout=settings.queue_timeout,
            watchdog=watchdog,
        ),
        config,
    )
    return Services(
        settings=settings,
        engine=engine,
        encoder=encoder,
        library=library,
        metrics=Metrics(
            lambda: engine.stats,
            [
                GatewayCollector(
                    lambda: engine.stats,
                    base.name,
                    NamesByDigest(database),
                    commits_of(database, settings.home),
                    config.block_size,
                ),
                HomeCollector(settings.home, jobs, settings.min_free_bytes),
                ServerCollector(base.name, lambda: engine.ready),
            ],
        ),
        guidance=guidance,
        base_name=base.name,
        max_model_len=min(max_model_len, config.kv_cache_bytes // _kv_bytes_per_token(base)),
        jobs=jobs,
        feeds=JobFeeds(jobs, lambda: engine.draining),
        datasets=datasets,
        files=files,
        submissions=Submissions(
            settings.home, jobs, RowSources(datasets, files), library, rows, longest, base.digest
        ),
        access=access,
        tracer=open_tracer(),
        estimator=Estimator(jobs, base.weights.num_parameters, training_dtype(base.dtype), base.device),
        decode=lambda ids: str(base.tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
    )


def _backend(
    settings: Settings, base: BaseModel, libraries: Sequence[Path], max_positions: int, say: Callable[[str], None]
) -> Backend:
    """Native where settings, machine and base allow it, else torch's."""
    native = load_native(base, libraries, max_positions, say) if settings.native else None
    if native is None:
        return TorchBackend(SmolLM(base.config, base.weights, max_positions=max_positions, pack=True))
    torch.set_num_threads(1)  # for what is left to torch: its threads would spin on cores that are taken
    return NativeBackend(native)


def _allocated(make: Callable[[], AsyncEngine], config: EngineConfig) -> AsyncEngine:
    """What `make` makes; StartupError where the caches don't fit into memory, which torch says in its own ways."""
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise StartupError(
            f"no memory for caches of {config.kv_cache_bytes} and {config.adapter_cache_bytes} bytes: "
            "lower SMOLORA_KV_CACHE_BYTES and SMOLORA_ADAPTER_CACHE_BYTES"
        ) from None


def _max_model_len(settings: Settings, base: BaseModel) -> int:
    longest = base.config.max_position_embeddings
    if settings.max_model_len is None:
        return min(longest, DEFAULT_MAX_MODEL_LEN)
    if settings.max_model_len > longest:
        raise StartupError(f"SMOLORA_MAX_MODEL_LEN={settings.max_model_len}: {base.name} ends at {longest} tokens")
    return settings.max_model_len


def _engine_config(settings: Settings, base: BaseModel, max_model_len: int) -> EngineConfig:
    block_size, limits = EngineConfig.block_size, SchedulerLimits.on(base.device.type, settings.max_num_seqs)
    padded_len = -(-max_model_len // block_size) * block_size
    one = padded_len * _kv_bytes_per_token(base)
    if base.device.type == "cpu":
        sizes = cpu_caches(settings, free_bytes(), one)
    else:
        needed = step_bytes(base.config, base.dtype.itemsize, limits, padded_len)
        sizes = gpu_caches(settings, *torch.cuda.mem_get_info(base.device), one, needed)
    return EngineConfig(
        max_model_len=max_model_len,
        kv_cache_bytes=sizes.kv_cache,
        adapter_cache_bytes=sizes.adapter_cache,
        scheduler=limits,
    )


def _end_token(base: BaseModel) -> int:
    """What training appends to rows."""
    own: int | None = base.tokenizer.eos_token_id
    found = (own, *base.config.eos_token_ids)
    ends = [token for token in found if token is not None]
    if not ends:
        raise StartupError(f"{base.name} has no end token: its answers would never end")
    return ends[0]


def _kv_bytes_per_token(base: BaseModel) -> int:
    return PagedCache.bytes_per_block(base.config, 1, base.dtype)
