"""What routes work with: built once at start-up, handed to the app, reached through `ServicesDep`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol, cast

from fastapi import Depends, Header, Request

from adapters.library import Library
from server.api.access.slots import Places, Slots
from server.api.train.estimate import Estimator
from server.api.train.feeds import JobFeeds
from server.api.train.submission import Submissions
from server.config import Settings
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.engine.structured.guidance import Guidance
from server.metrics import Metrics
from server.model.text.chat import PromptEncoder
from server.training.data.datasets import DatasetStore
from server.training.data.files import FileStore
from server.training.queue.jobs import Jobs


class OutputStream(Protocol):
    """A request's outputs, until all its choices have ended. `aclose` aborts it, even before the first one."""

    def __aiter__(self) -> "OutputStream": ...
    async def __anext__(self) -> SequenceOutput: ...
    async def aclose(self) -> None: ...


class EngineClient(Protocol):
    """The engine as the API knows it: `server.engine.async_engine.AsyncEngine`, or a test's double."""

    def start(self) -> None: ...
    async def stop(self) -> None: ...
    def check_queue(self, num_sequences: int, project: str = "") -> None: ...
    def submit(self, request: GenerationRequest) -> OutputStream: ...
    def drain(self) -> None: ...
    @property
    def ready(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
    @property
    def dead(self) -> bool: ...
    @property
    def hung(self) -> bool: ...
    @property
    def num_in_flight(self) -> int: ...
    @property
    def stats(self) -> EngineStats: ...


@dataclass(frozen=True)
class Limiters:
    """How much may be done at once, over all routes, of what takes cores, memory and disk from the engine."""

    encoding: Slots = field(default_factory=lambda: Slots("long prompts", 2, 64))  # each may cost seconds
    preparing: Slots = field(default_factory=lambda: Slots("training jobs", 2, 16))  # bodies that are tokenized
    checking: Slots = field(default_factory=lambda: Slots("files", 2, 16))  # of rows
    parsing: Slots = field(default_factory=lambda: Slots("adapters", 2, 16))  # hashed and copied
    fetching: Slots = field(default_factory=lambda: Slots("imports", 2, 16))
    uploads: Places = field(default_factory=lambda: Places("uploads", 16))  # on the disk, of up to 256 MiB each


@dataclass(frozen=True)
class Services:
    """Everything a route may need.

    `max_model_len` counts prompt and generated tokens of one sequence; `decode` is the tokenizer's.
    """

    settings: Settings
    engine: EngineClient
    encoder: PromptEncoder
    library: Library
    metrics: Metrics
    guidance: Guidance
    base_name: str
    max_model_len: int
    jobs: Jobs
    feeds: JobFeeds
    datasets: DatasetStore
    files: FileStore
    submissions: Submissions
    estimator: Estimator
    decode: Callable[[list[int]], str]
    limiters: Limiters = field(default_factory=Limiters)


def get_services(request: Request) -> Services:
    """The services that `create_app` was given."""
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(get_services)]

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="makes a repeat of a request for a job return the first one's",
    ),
]
