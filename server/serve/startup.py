"""Build the app's services from the settings, and suggest first prompts.

Building is slow the first time, because the base is converted. If this machine lacks something, raise
StartupError with a message of one line.
"""

import json
import shlex
from collections.abc import Callable
from functools import partial

from adapters.catalog.catalog import Catalog
from adapters.catalog.reads import NamesByDigest
from adapters.library import Library
from adapters.store.store import AdapterStore
from server.access.access import open_access
from server.access.principal import EVERYBODY
from server.api.deps import EngineClient, Limiters, RecentPins, Services
from server.api.estimate import Estimator
from server.api.housekeeping import clean_uploads
from server.api.job_feeds import JobFeeds
from server.api.quotas import quota_use
from server.api.submission import Submissions
from server.config import Settings
from server.database import agree, commits_at_once, commits_of, described, is_file, records_of, silence_of
from server.database import connect as connect_database
from server.database.silence import Outage
from server.engine.async_engine import Watchdog
from server.engine.engine import EngineConfig
from server.errors import StartupError
from server.jobs.jobs import Jobs
from server.jobs.presence import present_names
from server.metrics.engine import GatewayCollector
from server.metrics.home import HomeCollector
from server.metrics.metrics import Metrics, ServerCollector
from server.metrics.quotas import QuotaCollector
from server.model.base.source import hub_model
from server.model.base.weights import BaseModel, load_base
from server.model.device import training_dtype
from server.model.load import load_on_device
from server.model.text.chat import PromptEncoder
from server.serve.engine import (
    Say,
    base_directory,
    gpu_share,
    guidance_of,
    make_engine,
    max_model_len_of,
)
from server.storage.places import Storage
from server.system.messages import program
from server.system.version import commit
from server.telemetry.spans import open_tracer
from server.training.encoding import RowEncoder
from server.training.files import RowSources

_QUESTION = "What is the capital of France?"
_START = "The capital of France is"
_OPTIONS = ("--max-tokens", "16", "--temperature", "0")
_KEY = "YOUR_KEY"
_OWN_URL = "http://{host}:{port}".format(
    **{name: Settings.model_fields[name].default for name in ("host", "port")}
)
"""The URL of the server that commands use by default."""


def first_prompts(url: str, is_chat: bool, needs_key: bool) -> list[str]:
    """Return a smolora command and a curl command that ask a question, or complete a text if not `is_chat`.

    Both prompts are so easy that a base of any size answers correctly.
    """
    command = ["chat", _QUESTION] if is_chat else ["generate", _START]
    place = [] if url == _OWN_URL else ["--url", url]
    key = f"SMOLORA_API_KEY={_KEY} " if needs_key else ""
    ours = f"{key}{program()} {shlex.join([*command, *_OPTIONS, *place])}"

    start = {"messages": [{"role": "user", "content": _QUESTION}]} if is_chat else {"prompt": _START}
    header = f" -H 'Authorization: Bearer {_KEY}'" if needs_key else ""
    body = shlex.quote(json.dumps({**start, "max_tokens": 16, "temperature": 0}))
    return [ours, f"curl -s {url}/generate{header} -H 'Content-Type: application/json' -d {body}"]


Connect = Callable[[BaseModel, AdapterStore], EngineClient]
"""A function that returns a client of engines in other processes."""


def build(
    settings: Settings, say: Say, watchdog: Watchdog | None = None, connect: Connect | None = None
) -> Services:
    """Return the app's services, with an engine that isn't started.

    If `connect` is given, it connects to an engine in another process. `say` is called before each slow operation.
    """
    database = connect_database(settings.home, url=settings.database)
    storage, commits = Storage.open(settings.home, settings), commits_of(database, settings.home)
    stale_keys = settings.stale_names if settings.stale_keys is None else settings.stale_keys
    outage = Outage(silence_of(database), settings.stale_names, stale_keys)
    agree(database, storage.place)
    home = storage.home
    access = open_access(database, home.keyed, commits, settings.api_keys, settings.allows_guests, outage)
    directory = base_directory(settings, say)
    say(f"the database is {described(database)}")
    if connect is None:
        base = load_on_device(settings, directory, say, partial(gpu_share, settings))
    else:  # this process has no engine: it maps the weights, and never reads them
        base = load_base(directory)
    store = storage.adapters(grace=2 * settings.request_timeout)
    jobs = Jobs(database)
    records = records_of(database, home.adapters) if storage.bucket is None else storage.records()
    catalog = Catalog(database, records, EVERYBODY.viewpoint)
    library = Library(catalog, store, base.config.shape, base.name, jobs.in_use, base.digest)
    for line in library.recover(jobs.is_known).lines():
        say(line)
    clean_uploads(storage)
    sources = RowSources.of(storage, EVERYBODY.project)
    encoder = PromptEncoder(base.tokenizer)
    rows = RowEncoder(encoder, _end_token(base), base.config.eos_token_ids)
    longest = base.config.max_position_embeddings
    guidance = guidance_of(base)

    engine: EngineClient
    if connect is None:
        engine = make_engine(settings, base, store, guidance, say, watchdog)
    else:
        engine = connect(base, store)
    metrics = Metrics(
        engine.stats_by_replica,
        [
            GatewayCollector(
                lambda: engine.stats,
                base.name,
                NamesByDigest(database),
                commits_of(database, settings.home),
                EngineConfig.block_size,
            ),
            HomeCollector(
                settings.home,
                jobs,
                settings.min_free_bytes,
                elsewhere=None if is_file(database) else partial(present_names, database),
            ),
            ServerCollector(base.name, lambda: engine.ready and outage.is_survived),
        ],
    )
    services = Services(
        settings=settings,
        engine=engine,
        hub_base=hub_model(base.directory),
        tokenizer=base.tokenizer,
        encoder=encoder,
        library=library,
        metrics=metrics,
        guidance=guidance,
        base_name=base.name,
        max_model_len=max_model_len_of(settings, base),
        jobs=jobs,
        feeds=JobFeeds(jobs, lambda: engine.draining),
        datasets=sources.datasets,
        files=sources.files,
        submissions=Submissions(
            settings.home,
            jobs,
            sources,
            library,
            rows,
            longest,
            base.digest,
            base.weights.num_parameters,
            storage.bucket,
        ),
        access=access,
        limiters=Limiters.build(settings.queue_timeout, metrics.lanes, settings.max_connections),
        commit=commit(),
        bucket=storage.bucket,
        tracer=open_tracer(),
        recent_pins=RecentPins(commits_at_once(database, settings.home), outage),
        outage=outage,
        estimator=Estimator(jobs, base.weights.num_parameters, training_dtype(base.dtype), base.device),
    )
    metrics.add(QuotaCollector(partial(quota_use, services)))
    return services


def _end_token(base: BaseModel) -> int:
    """Return the token that training appends to rows."""
    found = (base.tokenizer.eos_token_id, *base.config.eos_token_ids)
    ends = [token for token in found if token is not None]
    if not ends:
        raise StartupError(f"{base.name} has no end token: its answers would never end")
    return ends[0]
