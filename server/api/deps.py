"""What routes work with: built once at start-up, handed to the app, reached through `ServicesDep`.

A route gets them as the project sees them that asks: it can't name, list or change another's things by mistake.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar, cast

from anyio import CancelScope, to_thread
from fastapi import Depends, Header, Request

from adapters.errors import SmoloraError
from adapters.expression import Term
from adapters.library import Library, Pinned
from adapters.names import Viewpoint
from server.access.access import Access
from server.access.principal import EVERYBODY, Principal
from server.api.authentication import principal_of
from server.api.bodies import BytesInFlight
from server.api.estimate import Estimator
from server.api.job_feeds import JobFeeds
from server.api.lanes import Lane, Places, Turns
from server.api.quotas import Incoming, Spooling
from server.api.submission import Submissions
from server.config import Settings
from server.engine.guidance import Guidance
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.jobs.files import Retention
from server.jobs.jobs import Jobs
from server.metrics.metrics import LaneMetrics, Metrics
from server.model.text.chat import PromptEncoder
from server.storage.home import Home
from server.storage.places import Storage
from server.telemetry.spans import Tracer
from server.training.datasets import DatasetStore
from server.training.files import FileStore, RowSources

_MAX_EXPRESSIONS = 4096  # remembered at once; beyond that, all are resolved again

log = logging.getLogger("smolora.api")


class RecentPins:
    """`Library.pin` for one event loop, with a cache that is valid until the next commit to the database.

    To resolve an expression takes SQL in a thread, a millisecond or two before the first token. To ask whether
    anybody has committed takes microseconds.
    """

    def __init__(self, commits: Callable[[], int | None]) -> None:
        """`commits()` changes at once with any commit. While it returns None, nothing is cached."""
        self._commits = commits
        self._seen: int | None = None
        self._known: dict[tuple[Viewpoint, tuple[Term, ...]], Pinned] = {}  # released

    async def pin(self, library: Library, terms: Sequence[Term], field: str) -> Pinned:
        """Pin the terms' bytes as `Library.pin` does, which is called in a thread for unknown terms."""
        if (seen := self._commits()) is None:
            return await to_thread.run_sync(library.pin, terms, field)
        key = (library.catalog.viewpoint, tuple(terms))
        if seen != self._seen or len(self._known) >= _MAX_EXPRESSIONS:
            self._seen = seen
            self._known.clear()
        if (found := self._known.get(key)) is not None:
            pinned = Pinned(found.parts, found.warnings, library.store)
            if self._commits() == seen:  # names are deleted before bytes: these bytes were still named when pinned
                return pinned
            await release(pinned)
        pinned = await to_thread.run_sync(library.pin, terms, field)
        if self._commits() == seen == self._seen:
            self._known[key] = Pinned(pinned.parts, pinned.warnings)
        return pinned


async def release(pinned: Pinned) -> None:
    """Release on the event loop; a thread removes the bytes of deleted versions. If that fails, it is logged, and
    the next sweep removes them.
    """
    if (removal := pinned.unpin()) is not None:
        try:
            with CancelScope(shield=True):  # until the next sweep, nobody else would remove the bytes
                await to_thread.run_sync(removal)
        except Exception:  # the disk, or the database
            log.exception("can't remove the bytes of a deleted version just now")


if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

_MAX_VIEWS = 1024

T = TypeVar("T")


class OutputStream(Protocol):
    """A request's outputs, until all its choices have ended. `aclose` aborts it, even before the first one.

    An error that is `put` is raised once what came before it was read.
    """

    def __aiter__(self) -> "OutputStream": ...
    async def __anext__(self) -> SequenceOutput: ...
    def put(self, output: SequenceOutput | SmoloraError) -> None: ...
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
    def max_in_flight(self) -> int | None: ...
    @property
    def max_num_tokens(self) -> int | None: ...
    @property
    def stats(self) -> EngineStats: ...


@dataclass(frozen=True)
class Limiters:
    """How much may be done at once, over all routes, of what takes cores, memory and disk from the engine."""

    encoding: Lane
    grammars: Lane
    preparing: Lane
    checking: Lane
    parsing: Lane
    fetching: Lane
    merging: Lane
    uploads: Places
    bodies: BytesInFlight
    incoming: Incoming = field(default_factory=Incoming)
    spooling: Spooling = field(default_factory=Spooling)

    @classmethod
    def build(cls, queue_timeout: float, metrics: LaneMetrics) -> "Limiters":
        """Bound what waits for a thread to `queue_timeout` seconds."""
        lane = partial(Lane, timeout=queue_timeout, metrics=metrics)
        data = Turns(2)  # much of their work holds the GIL, which the engine's steps need, too
        return cls(  # the last free thread is for another project
            encoding=lane("encoding", "long prompts", Turns(2), 64),
            grammars=lane(
                "grammars", "grammars", Turns(1), 16, steps_back=False
            ),  # Guidance compiles one at a time
            preparing=lane("preparing", "training jobs", data, 16),
            checking=lane("checking", "files", data, 16),  # of rows
            parsing=lane("parsing", "adapters", data, 16),  # hashed and copied
            merging=lane("merging", "merges", data, 16),
            fetching=lane("fetching", "imports", Turns(3), 16),
            uploads=Places("uploads", 16, name="uploads", metrics=metrics),  # on the disk, of up to 256 MiB each
            bodies=BytesInFlight(metrics=metrics),
        )

    def of(self, project: str) -> "Limiters":
        """Return views of the same for a project."""
        shared = {
            name: value.of(project)
            for name, value in vars(self).items()
            if not isinstance(value, BytesInFlight | Incoming | Spooling)
        }
        return replace(self, **shared)


@dataclass(frozen=True)
class Services:
    """Everything a route may need.

    `max_model_len` is what settings and base allow; `decode` is the tokenizer's.
    """

    settings: Settings
    engine: EngineClient
    encoder: PromptEncoder
    library: Library
    recent_pins: RecentPins
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
    access: Access
    limiters: Limiters
    tracer: Tracer | None = None
    principal: Principal = EVERYBODY  # for whom library, jobs, data sets, files and submissions are
    bucket: "Bucket | None" = None  # which has, where there is one, what HOME would have
    _views: "dict[Principal, Services]" = field(default_factory=dict, repr=False)

    def of(self, principal: Principal) -> "Services":
        """The same for another one."""
        if principal == self.principal:
            return self
        if (view := self._views.get(principal)) is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            view = self._views[principal] = self._seen_by(principal)
        return view

    @property
    def max_num_tokens(self) -> int:
        """Of one sequence, prompt and answer: fewer than `max_model_len` where the engine has room for fewer."""
        most = self.engine.max_num_tokens
        return self.max_model_len if most is None else min(most, self.max_model_len)

    @property
    def storage(self) -> Storage:
        return Storage(Home(self.settings.home), self.bucket)

    @property
    def retention(self) -> Retention:
        """The files of the jobs."""
        return Retention(self.settings.home, self.jobs, self.bucket)

    def audited(
        self,
        action: str,
        target: str,
        deed: Callable[[], T],
        detail: Mapping[str, object] | None = None,
        project: str | None = None,
    ) -> T:
        """What the deed comes to, which is then on the audit list. Blocks on disk.

        `project`: whose thing it is, where that may be another's than the caller's own.
        """
        result = deed()
        self.access.audit.add(self.principal.key_id, action, project or self.principal.project, target, detail)
        return result

    def _seen_by(self, principal: Principal) -> "Services":
        storage, viewpoint = self.storage, principal.viewpoint
        home = storage.home
        library = self.library.of(viewpoint)
        jobs = self.jobs.of(viewpoint, principal.project_quota.max_jobs, principal.quota.max_jobs)
        own_datasets, own_files = home.datasets(viewpoint.project), home.files(viewpoint.project)
        datasets = DatasetStore(own_datasets, viewpoint.key_id, storage.at(own_datasets))
        files = FileStore(own_files, viewpoint.key_id, storage.at(own_files))
        submissions = self.submissions.of(jobs, RowSources(datasets, files), library)
        return replace(
            self,
            principal=principal,
            library=library,
            jobs=jobs,
            datasets=datasets,
            files=files,
            submissions=submissions,
            limiters=self.limiters.of(viewpoint.project),
        )


async def get_services(request: Request) -> Services:
    """The services that `create_app` was given, for whoever asks; for everybody where no key is asked for.

    It awaits nothing: FastAPI sends what is no coroutine to a thread and back, for each request.
    """
    services = cast(Services, request.app.state.services)
    return services.of(principal_of(request.scope) or services.principal)


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
