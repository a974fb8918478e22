"""Stream jobs' events to clients as they happen.

A client that streams a job's events is called a follower. A single task polls the database for all followers: a
few times a second, it reads the new events of every followed job. The task starts with the first follower and ends
with the last. A follower that is too far behind reads older events by itself, page by page. The feeds have two
threads of their own to read the database, so followers never delay other requests.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Protocol

from anyio import CapacityLimiter, to_thread

from adapters.errors import NotFound
from server.api import wire
from server.api.lanes import Places
from server.api.train_answers import EventAnswer
from server.jobs.jobs import Event, Standing, no_job

POLL_SECONDS = 0.3
KEEP_ALIVE_SECONDS = 15.0
MAX_FOLLOWERS = 256
PAGE = 500
"""The most events that are read at once, and the most recent events that are kept in memory for each job."""

_NUM_THREADS = 2


class JobSource(Protocol):
    """The part of `server.jobs.jobs.Jobs` that feeds need. Tests use a test double."""

    def standings(self, job_ids: Sequence[str]) -> Mapping[str, Standing]: ...
    def events(self, job_id: str, after: int, limit: int) -> list[Event]: ...


class _Feed:
    """What is known of one job: its recent events, and whether it has ended. The job's followers share it.

    When any of that changes, `changed` is set and replaced by a new `asyncio.Event`.
    """

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.num_followers = 0
        self.last: int | None = None  # the newest event's seq; None before the first poll
        self.has_ended = False
        self.error: Exception | None = None
        self.changed = asyncio.Event()
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=PAGE)  # without gaps, up to `last`

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            self._recent.append((event.seq, _encoded(event)))
            self.last = event.seq

    def kept(self, after: int) -> list[tuple[int, bytes]] | None:
        """Return the events after the event `after`, or None if some of these are no longer in memory."""
        if not self._recent or after < self._recent[0][0] - 1:
            return None
        return list(islice(self._recent, after + 1 - self._recent[0][0], None))

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Follower:
    """A client that follows one feed. Iterate over `stream` once, and call `close` at the end."""

    def __init__(self, feeds: "JobFeeds", feed: _Feed, after: int, project: str) -> None:
        self._feeds = feeds
        self._project = project
        self._feed = feed
        self._after = after
        self._closed = False

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield server-sent events until the job ends or the server stops.

        Raise NotFound if there is no such job.
        """
        feed, feeds = self._feed, self._feeds
        while feed.last is None and feed.error is None:
            await feed.changed.wait()
        if feed.error is None:
            yield b": the job's events\n\n"  # sends the headers before the first event
        while True:
            changed = feed.changed  # taken before reading, so that no change is missed
            if feed.error is not None:
                raise feed.error
            assert feed.last is not None
            if self._after < feed.last:
                for seq, event in feed.kept(self._after) or await feeds.read(feed.job_id, self._after):
                    yield event
                    self._after = seq
                continue
            if feed.has_ended or feeds.is_ending():
                return
            try:
                async with asyncio.timeout(feeds.keep_alive):
                    await changed.wait()
            except TimeoutError:
                yield b": still there\n\n"

    async def close(self) -> None:
        """Stop following the job. Idempotent."""
        if not self._closed:
            self._closed = True
            self._feeds.leave(self._feed, self._project)


class JobFeeds:
    """The feeds of all followed jobs, for one event loop.

    `poll` is the number of seconds between reads of the database. After `keep_alive` seconds without a change, a
    follower gets a comment.
    """

    def __init__(
        self,
        jobs: JobSource,
        is_ending: Callable[[], bool] = lambda: False,
        poll: float = POLL_SECONDS,
        keep_alive: float = KEEP_ALIVE_SECONDS,
        max_followers: int = MAX_FOLLOWERS,
    ) -> None:
        self.is_ending = is_ending
        self.keep_alive = keep_alive
        self._jobs = jobs
        self._poll = poll
        self._places = Places("event streams", max_followers)
        self._reading = CapacityLimiter(_NUM_THREADS)
        self._feeds: dict[str, _Feed] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_polling(self) -> bool:
        return self._task is not None and not self._task.done()

    def follow(self, job_id: str, after: int, project: str = "") -> Follower:
        """Follow a job's events after the event `after`. Raise QueueFull if there are too many followers.

        The caller must have checked that the project may see the job.
        """
        self._places.take(project)
        if (feed := self._feeds.get(job_id)) is None:
            feed = self._feeds[job_id] = _Feed(job_id)
            self._wake.set()
        feed.num_followers += 1
        if not self.is_polling:
            self._task = asyncio.create_task(self._run())
        return Follower(self, feed, after, project)

    def leave(self, feed: _Feed, project: str) -> None:
        """Remove a project's follower from a feed, and drop the feed if that was its last follower."""
        self._places.give_back(project)
        feed.num_followers -= 1
        if not feed.num_followers and self._feeds.get(feed.job_id) is feed:
            del self._feeds[feed.job_id]
            self._wake.set()

    async def read(self, job_id: str, after: int) -> list[tuple[int, bytes]]:
        """Return a page of events to a follower that is far behind. Raise NotFound if the events were removed."""
        found = await to_thread.run_sync(self._jobs.events, job_id, after, PAGE, limiter=self._reading)
        if not found:
            raise NotFound(f"the events of job {job_id} were removed")
        return [(event.seq, _encoded(event)) for event in found]

    async def _run(self) -> None:
        while self._feeds:
            self._wake.clear()
            feeds = dict(self._feeds)
            try:
                has_more = await self._look(feeds)
            except Exception as error:  # each follower raises it
                has_more = False
                for feed in feeds.values():
                    self._fail(feed, error)
            if not has_more:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll):
                        await self._wake.wait()

    async def _look(self, feeds: Mapping[str, _Feed]) -> bool:
        """Read new events and notify the followers. Return whether there are more events to read immediately."""
        lasts = {job_id: feed.last for job_id, feed in feeds.items()}
        found = await to_thread.run_sync(self._new_events, lasts, limiter=self._reading)
        has_more = False
        for job_id, feed in feeds.items():
            if job_id not in found:
                self._fail(feed, no_job(job_id))
                continue
            standing, events = found[job_id]
            before = feed.last
            if events:
                feed.add(events)
            else:  # at first, followers read the older events themselves; later, there are no new events
                feed.last = standing.num_events
            assert feed.last is not None
            is_behind = feed.last < standing.num_events
            feed.has_ended = standing.status.has_ended and not is_behind
            has_more |= is_behind
            if feed.last != before or feed.has_ended or self.is_ending():
                feed.notify()
        return has_more

    def _new_events(self, lasts: Mapping[str, int | None]) -> dict[str, tuple[Standing, list[Event]]]:
        # statuses are read first: a job that has ended by then gets no more events
        found = {}
        for job_id, standing in self._jobs.standings(list(lasts)).items():
            last = lasts[job_id]
            is_new = last is not None and last < standing.num_events
            found[job_id] = (standing, self._jobs.events(job_id, last or 0, PAGE) if is_new else [])
        return found

    def _fail(self, feed: _Feed, error: Exception) -> None:
        """Make the feed's followers raise `error`, and drop the feed."""
        feed.error = error
        feed.notify()
        if self._feeds.get(feed.job_id) is feed:
            del self._feeds[feed.job_id]


def _encoded(event: Event) -> bytes:
    return b"id: %d\n" % event.seq + wire.event(EventAnswer.model_validate(event))
