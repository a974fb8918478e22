"""An app around a fake engine, with a real catalog and store in a temporary home."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from adapters.catalog import Catalog
from adapters.lora import BaseShape
from adapters.store import AdapterStore
from server.api.app import create_app
from server.api.deps import Services
from server.api.library import Library
from server.config import Settings
from server.database import connect
from server.metrics import Metrics
from server.model.chat import PromptEncoder
from tests.server.api.fakes import FakeEngine
from tests.tiny import tiny_tokenizer

BASE_NAME = "tiny-llama"
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

MakeServices = Callable[..., Services]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def encoder() -> PromptEncoder:
    return PromptEncoder(tiny_tokenizer())


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture
def library(tmp_path: Path, store: AdapterStore) -> Library:
    return Library(Catalog(connect(tmp_path)), store, SHAPE, BASE_NAME)


@pytest.fixture
def make_services(engine: FakeEngine, encoder: PromptEncoder, library: Library, tmp_path: Path) -> MakeServices:
    def make(**settings: object) -> Services:
        return Services(
            settings=Settings.model_validate({"home": tmp_path, **settings}),
            engine=engine,
            encoder=encoder,
            library=library,
            metrics=Metrics(lambda: engine.stats),
            base_name=BASE_NAME,
            max_model_len=MAX_MODEL_LEN,
        )

    return make


@pytest.fixture
def app(make_services: MakeServices) -> FastAPI:
    return create_app(make_services())


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client
