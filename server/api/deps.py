"""The services that routes use, and receive as `ServicesDep`.

The services are built once at start-up. A route gets a view of them for the project that sends the request, so it
can't read or change another project's data by mistake.
"""

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar, cast

from anyio import CancelScope, to_thread
from fastapi import Depends, Header, Request

from adapters.catalog.versions import VersionLimits
from adapters.errors import SmoloraError, Unavailable
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
from server.database.silence import Outage
from server.engine.guidance import Guidance
from server.engine.request import EngineStats, GenerationRequest, SequenceOutput
from server.jobs.files import Retention
from server.jobs.jobs import Jobs
from server.jobs.queries import num_publishing
from server.metrics.metrics import LaneMetrics, Metrics
from server.model.base.source import HubModel
from server.model.text.chat import PromptEncoder
from server.model.text.tokenizer import BaseTokenizer
from server.storage.home import Home
from server.storage.places import Storage
from server.telemetry.spans import Tracer
from server.training.datasets import DatasetStore
from server.training.files import FileStore, RowSources

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

_MAX_EXPRESSIONS = 4096  # once there are more, all are forgotten
_MAX_VIEWS = 1024

T = TypeVar("T")

log = logging.getLogger("smolora.api")


_Expression = tuple[Viewpoint, tuple[Term, ...]]


class RecentPins:
    """A cache of resolved adapter expressions, valid until the next commit to the database.

    Resolving an expression runs SQL in a thread, which delays the first token by a millisecond or two. Checking
    for commits takes microseconds. While the database doesn't answer, `outage` says for how long older results
    are used. Use each instance from one event loop only.
    """

    def __init__(
        self,
        commits: Callable[[], int | None],
        outage: Outage | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`commits` returns a number that changes with every commit, or None, which turns the cache off."""
        self._commits = commits
        self._outage = outage or Outage()
        self._clock = clock
        self._seen: int | None = None
        self._known: dict[_Expression, Pinned] = {}  # these hold no pins
        self._older: OrderedDict[_Expression, tuple[float, Pinned]] = OrderedDict()  # when they were resolved

    async def pin(self, library: Library, terms: Sequence[Term], field: str) -> Pinned:
        """Pin the adapter versions that `terms` name, as `Library.pin` does.

        If the versions are cached, no SQL is run.
        """
        key = (replace(library.catalog.viewpoint, key_id=None), tuple(terms))  # all keys of a project see the same
        if (seen := self._commits()) is None:
            return await self._pin_or_remember(key, library, terms, field)
        if seen != self._seen or len(self._known) >= _MAX_EXPRESSIONS:
            self._seen = seen
            self._known.clear()
        if (found := self._known.get(key)) is not None:
            pinned = Pinned(found.parts, found.warnings, library.store)
            if self._commits() == seen:  # names are deleted before bytes, so these bytes stay while pinned
                return pinned
            await release(pinned)
        pinned = await to_thread.run_sync(library.pin, terms, field)
        if self._commits() == seen == self._seen:
            self._known[key] = Pinned(pinned.parts, pinned.warnings)
        return pinned

    async def _pin_or_remember(
        self, key: _Expression, library: Library, terms: Sequence[Term], field: str
    ) -> Pinned:
        """Resolve the terms. If the database doesn't answer, use a former result that isn't too old."""
        if self._outage.is_on and (older := self._recall(key, library)) is not None:
            return older
        began = self._clock()
        try:
            pinned = await to_thread.run_sync(library.pin, terms, field)
        except Unavailable:
            if (older := self._recall(key, library)) is not None:
                return older
            raise
        except SmoloraError:  # such as NotFound, if the adapter was deleted
            self._older.pop(key, None)
            raise
        self._older[key] = began, Pinned(pinned.parts, pinned.warnings)
        self._older.move_to_end(key)
        if len(self._older) > _MAX_EXPRESSIONS:
            self._older.popitem(last=False)
        return pinned

    def _recall(self, key: _Expression, library: Library) -> Pinned | None:
        """Return the last result for `key`, pinned, or None if there is none that may still be used."""
        resolved_at, found = self._older.get(key, (-math.inf, Pinned()))
        if self._clock() - resolved_at > self._outage.names:
            return None
        return Pinned(found.parts, found.warnings, library.store)


async def release(pinned: Pinned) -> None:
    """End a request's use of its adapters.

    Bytes of deleted versions that nothing uses any more are removed in a thread. If the removal fails, the error
    is only logged, since it doesn't affect the request's answer. The next periodic cleanup tries again.
    """
    if (removal := pinned.unpin()) is not None:
        try:
            with CancelScope(shield=True):  # until the next sweep, only this call can do the removal
                await to_thread.run_sync(removal)
        except Exception:  # an error of the disk or the database
            log.exception("can't remove the bytes of a deleted version")


class OutputStream(Protocol):
    """An iterator over a request's outputs, until all its choices have ended.

    `aclose` may be called at any time, and aborts the request. If an error is passed to `put`, the iterator still
    yields all earlier outputs, and then raises the error.
    """

    def __aiter__(self) -> "OutputStream": ...
    async def __anext__(self) -> SequenceOutput: ...
    def put(self, output: SequenceOutput | SmoloraError) -> None: ...
    async def aclose(self) -> None: ...


class EngineClient(Protocol):
    """The methods of `server.engine.async_engine.AsyncEngine` that the API calls. Tests use a test double."""

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
    def stats_by_replica(self, *, is_complete: bool) -> Mapping[str, EngineStats]: ...


@dataclass(frozen=True)
class Limiters:
    """Limits, across all routes, on concurrent work that takes processors, memory or disk away from the engine."""

    encoding: Lane
    grammars: Lane
    preparing: Lane
    checking: Lane
    parsing: Lane
    fetching: Lane
    merging: Lane
    uploads: Places
    connections: Places
    bodies: BytesInFlight
    incoming: Incoming = field(default_factory=Incoming)
    spooling: Spooling = field(default_factory=Spooling)

    @classmethod
    def build(cls, queue_timeout: float, metrics: LaneMetrics, max_connections: int) -> "Limiters":
        """Make the limiters. Work waits for a thread for at most `queue_timeout` seconds."""
        lane = partial(Lane, timeout=queue_timeout, metrics=metrics)
        data = Turns(2)  # much of this work holds the GIL, which the engine's steps need, too
        return cls(  # the last free thread is reserved for a project that has none
            encoding=lane("encoding", "long prompts", Turns(2), 64),
            # Guidance compiles one grammar at a time
            grammars=lane("grammars", "grammars", Turns(1), 16, steps_back=False),
            preparing=lane("preparing", "training jobs", data, 16),
            checking=lane("checking", "files", data, 16),  # files of rows
            parsing=lane("parsing", "adapters", data, 16),  # weights are hashed and copied
            merging=lane("merging", "merges", data, 16),
            fetching=lane("fetching", "imports", Turns(3), 16),
            uploads=Places("uploads", 16, name="uploads", metrics=metrics),  # up to 256 MiB of disk each
            connections=Places("requests", max_connections, name="connections", metrics=metrics),
            bodies=BytesInFlight(metrics=metrics),
        )


@dataclass(frozen=True)
class Services:
    """Everything that routes need, restricted to what `principal` may see.

    `max_model_len` is the longest sequence, in tokens, that the settings and the base model allow.
    """

    settings: Settings
    engine: EngineClient
    hub_base: HubModel | None  # the base on the hub, if the hub has it
    tokenizer: BaseTokenizer
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
    access: Access
    limiters: Limiters
    commit: str | None  # the commit of this code when the server started; None if it isn't known
    tracer: Tracer | None = None
    principal: Principal = EVERYBODY  # sets what library, jobs, datasets, files and submissions show
    bucket: "Bucket | None" = None  # if there is one, it stores bytes instead of HOME
    outage: Outage = field(default_factory=Outage)
    _views: "dict[Principal, Services]" = field(default_factory=dict, repr=False)

    def of(self, principal: Principal) -> "Services":
        """Return the same services, restricted to what `principal` may see."""
        if principal == self.principal:
            return self
        if (view := self._views.get(principal)) is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            view = self._views[principal] = self._seen_by(principal)
        return view

    @property
    def max_num_tokens(self) -> int:
        """The most tokens of a prompt and its answer together: `max_model_len`, or the engine's limit if lower."""
        most = self.engine.max_num_tokens
        return self.max_model_len if most is None else min(most, self.max_model_len)

    @property
    def storage(self) -> Storage:
        return Storage(Home(self.settings.home), self.bucket)

    @property
    def retention(self) -> Retention:
        """The object that removes the files of ended jobs."""
        return Retention(self.settings.home, self.jobs, self.bucket)

    def audited(
        self,
        action: str,
        target: str,
        deed: Callable[[], T],
        detail: Mapping[str, object] | None = None,
        project: str | None = None,
    ) -> T:
        """Run `deed`, record the action in the audit list, and return the result of `deed`.

        `project` is the owner of the target; the default is the caller's project. This does disk I/O, so it may
        block.
        """
        result = deed()
        self.audit(action, target, detail, project)
        return result

    def audit(
        self, action: str, target: str, detail: Mapping[str, object] | None = None, project: str | None = None
    ) -> None:
        """Record in the audit list what the caller has done. The arguments are as in `audited`."""
        self.access.audit.add(self.principal.key_id, action, project or self.principal.project, target, detail)

    def _seen_by(self, principal: Principal) -> "Services":
        viewpoint = principal.viewpoint
        of_project, of_key = principal.project_quota.max_versions, principal.quota.max_versions
        limits = VersionLimits(of_project, of_key, num_publishing)
        library = self.library.of(viewpoint, limits)
        jobs = self.jobs.of(viewpoint, principal.project_quota.max_jobs, principal.quota.max_jobs)
        sources = RowSources.of(self.storage, viewpoint.project, viewpoint.key_id)
        return replace(
            self,
            principal=principal,
            library=library,
            jobs=jobs,
            datasets=sources.datasets,
            files=sources.files,
            submissions=replace(self.submissions, jobs=jobs, sources=sources, library=library),
        )


async def get_services(request: Request) -> Services:
    """Return the services, restricted to what the request's principal may see.

    This is a coroutine because FastAPI runs ordinary functions in a thread.
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
        description="a repeated request with the same key returns the first request's job",
    ),
]
