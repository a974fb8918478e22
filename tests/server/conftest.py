"""An app around a fake engine, with a real catalog and store in a temporary home."""

import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
import torch
from fastapi import FastAPI

from adapters.catalog.catalog import Catalog
from adapters.catalog.records import Records
from adapters.library import Library
from adapters.lora import BaseShape
from adapters.store.store import AdapterStore
from server.access.access import open_access
from server.api.app import create_app
from server.api.deps import Limiters, RecentPins, Services
from server.api.estimate import Estimator
from server.api.job_feeds import JobFeeds
from server.api.submission import Submissions
from server.config import PREFIX, Settings
from server.database import FILE_NAME, commits_at_once, commits_of, connect
from server.engine.guidance import Guidance
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.metrics.metrics import Metrics
from server.model.text.chat import PromptEncoder
from server.model.text.tokenizer import BaseTokenizer
from server.storage.home import Home
from server.training.datasets import DatasetStore
from server.training.encoding import RowEncoder
from server.training.files import FileStore, RowSources
from tests.kits.grammars import guidance_of
from tests.kits.tiny import own, tiny_tokenizer
from tests.server.api.fakes import FakeEngine

BASE_NAME = "tiny-llama"
BASE_DIGEST = "ba" * 32
SHAPE = BaseShape(
    2,
    {
        "q_proj": (16, 16),
        "k_proj": (8, 16),
        "v_proj": (8, 16),
        "o_proj": (16, 16),
        "gate_proj": (24, 16),
        "up_proj": (24, 16),
        "down_proj": (16, 24),
    },
)
MAX_MODEL_LEN = 96
MAX_POSITIONS = 512
NUM_PARAMETERS = 1_000_000
COMMIT = "c0ffee"

MakeServices = Callable[..., Services]

EOS = 2
"""The end token of the tiny tokenizer."""

shared_tokenizer = cache(lambda: own(tiny_tokenizer()))
"""Read only."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def encoder() -> PromptEncoder:
    return PromptEncoder(shared_tokenizer())


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a fully migrated database. Copying it is faster than creating another one."""
    home = tmp_path_factory.mktemp("database")
    connect(home).dispose()
    return home / FILE_NAME


@pytest.fixture
def app_database_url() -> str | None:
    """Return None: the file under HOME. Folders whose tests run on both databases override `database_url`."""
    return None


@pytest.fixture
def database(app_database_url: str | None, new_database: Path, tmp_path: Path) -> Iterator[sa.Engine]:
    if app_database_url is None:
        shutil.copy(new_database, tmp_path)
    engine = connect(tmp_path, url=app_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def jobs(database: sa.Engine) -> Jobs:
    return Jobs(database, max_unfinished=20)


@pytest.fixture
def leases(database: sa.Engine, tmp_path: Path) -> Leases:
    """Return the workers' view of the jobs."""
    return Leases(database, Records(tmp_path / "adapters"))


def library_in(home: Path, database: sa.Engine, store: AdapterStore, jobs: Jobs) -> Library:
    catalog = Catalog(database, Records(home / "adapters"))
    return Library(catalog, store, SHAPE, BASE_NAME, jobs.in_use, BASE_DIGEST)


@pytest.fixture
def library(database: sa.Engine, store: AdapterStore, jobs: Jobs, tmp_path: Path) -> Library:
    return library_in(tmp_path, database, store, jobs)


@pytest.fixture
def datasets(tmp_path: Path) -> DatasetStore:
    return DatasetStore(tmp_path / "datasets")


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def new_guidance() -> Guidance:
    """Return a `Guidance`, to be closed."""
    tokenizer = shared_tokenizer()
    return guidance_of(tokenizer, len(tokenizer), (EOS,))


@pytest.fixture
def guidance() -> Iterator[Guidance]:
    guidance = new_guidance()
    yield guidance
    guidance.close()


def settings_of(home: Path, given: dict[str, object]) -> Settings:
    if given:
        return Settings.model_validate({"home": home, **given})
    variables = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    return _plain_settings(tuple(variables.items())).model_copy(update={"home": home})


@cache
def _plain_settings(_: tuple[tuple[str, str], ...]) -> Settings:
    """Return the settings of these environment variables, cached: reading them takes longer than many tests."""
    return Settings.model_validate({})


def build_services(
    home: Path,
    engine: FakeEngine,
    encoder: PromptEncoder,
    library: Library,
    jobs: Jobs,
    datasets: DatasetStore,
    files: FileStore,
    guidance: Guidance,
    database: sa.Engine,
    tokenizer: BaseTokenizer,
    **given: object,
) -> Services:
    """Return the services for `create_app`, made of these parts; `given` are settings."""
    settings = settings_of(home, given)
    rows = RowEncoder(encoder, EOS)
    metrics = Metrics(engine.stats_by_replica)
    return Services(
        settings=settings,
        engine=engine,
        hub_base=None,
        tokenizer=tokenizer,
        encoder=encoder,
        library=library,
        recent_pins=RecentPins(commits_at_once(database, home)),
        metrics=metrics,
        guidance=guidance,
        base_name=BASE_NAME,
        max_model_len=MAX_MODEL_LEN,
        jobs=jobs,
        feeds=JobFeeds(jobs, lambda: engine.draining),
        datasets=datasets,
        files=files,
        submissions=Submissions(
            home, jobs, RowSources(datasets, files), library, rows, MAX_POSITIONS, BASE_DIGEST, NUM_PARAMETERS
        ),
        estimator=Estimator(jobs, NUM_PARAMETERS, torch.float32, torch.device("cpu")),
        limiters=Limiters.build(settings.queue_timeout, metrics.lanes, settings.max_connections),
        commit=COMMIT,
        access=open_access(
            database, Home(home).keyed, commits_of(database, home), settings.api_keys, settings.allows_guests
        ),
    )


@pytest.fixture
def make_services(
    engine: FakeEngine,
    encoder: PromptEncoder,
    library: Library,
    jobs: Jobs,
    datasets: DatasetStore,
    files: FileStore,
    guidance: Guidance,
    database: sa.Engine,
    tmp_path: Path,
) -> MakeServices:
    def make(**given: object) -> Services:
        return build_services(
            tmp_path,
            engine,
            encoder,
            library,
            jobs,
            datasets,
            files,
            guidance,
            database,
            shared_tokenizer(),
            **given,
        )

    return make


_last_app: list[FastAPI] = []
"""Empty, or one application."""


def new_app(services: Services) -> FastAPI:
    """Return `create_app`'s application with the last one's routes, and its document if it was requested.

    FastAPI computes both at the first request, which takes longer than most tests. They are the same for all
    settings except a prefix. Overridden dependencies are the first application's.
    """
    app = create_app(services)
    for last in _last_app:
        app.router.routes[:] = last.router.routes
        app.openapi_schema = last.openapi_schema
    _last_app[:] = [app]
    return app


@pytest.fixture
def app(make_services: MakeServices) -> FastAPI:
    return new_app(make_services())


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8000")


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client
