"""Jobs' events as they happen, for any number of followers: the database is asked once for all of them.

One task looks, a few times a second, at every job that somebody follows, and reads what is new. It begins with the
first follower and ends with the last. Whoever is further behind than what is kept here reads that for itself, page
by page. All of it has two threads of its own: however many follow, names are resolved as quickly.
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
"""Events that are read at once, and that are kept of each job."""

_NUM_THREADS = 2


class JobSource(Protocol):
    """What is asked: `server.jobs.jobs.Jobs`, or a test's double."""

    def standings(self, job_ids: Sequence[str]) -> Mapping[str, Standing]: ...
    def events(self, job_id: str, after: int, limit: int) -> list[Event]: ...


class _Feed:
    """What its followers share of one job. `changed` is set, and another takes its place, when there is news."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.num_followers = 0
        self.last: int | None = None  # the newest event's seq; None: nobody has looked yet
        self.has_ended = False
        self.error: Exception | None = None
        self.changed = asyncio.Event()
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=PAGE)  # without gaps, up to `last`

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            self._recent.append((event.seq, _encoded(event)))
            self.last = event.seq

    def kept(self, after: int) -> list[tuple[int, bytes]] | None:
        """The events after that one; None where some of them are no longer kept."""
        if not self._recent or after < self._recent[0][0] - 1:
            return None
        return list(islice(self._recent, after + 1 - self._recent[0][0], None))

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Follower:
    """One who follows a job. Iterate `stream` once; `close` at the end."""

    def __init__(self, feeds: "JobFeeds", feed: _Feed, after: int, place: Places) -> None:
        self._feeds = feeds
        self._place = place
        self._feed = feed
        self._after = after
        self._closed = False

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events, until the job or the server ends. Raises NotFound at once where there is no job."""
        feed, feeds = self._feed, self._feeds
        while feed.last is None and feed.error is None:
            await feed.changed.wait()
        if feed.error is None:
            yield b": the job's events\n\n"  # so that headers don't wait for the first of them
        while True:
            changed = feed.changed  # before looking, so that no news is missed
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
        """Follow no more. More than once is once."""
        if not self._closed:
            self._closed = True
            self._place.give_back()
            self._feeds.leave(self._feed)


class JobFeeds:
    """The feeds of all jobs that are followed. For one event loop; `poll` and `keep_alive` are seconds."""

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
        """The job's events after the one numbered `after`, for a project that may see it. Raises QueueFull."""
        place = self._places.of(project)
        place.take()
        if (feed := self._feeds.get(job_id)) is None:
            feed = self._feeds[job_id] = _Feed(job_id)
            self._wake.set()
        feed.num_followers += 1
        if not self.is_polling:
            self._task = asyncio.create_task(self._run())
        return Follower(self, feed, after, place)

    def leave(self, feed: _Feed) -> None:
        """One of its followers has gone."""
        feed.num_followers -= 1
        if not feed.num_followers and self._feeds.get(feed.job_id) is feed:
            del self._feeds[feed.job_id]
            self._wake.set()

    async def read(self, job_id: str, after: int) -> list[tuple[int, bytes]]:
        """A page of events, for one who is far behind. Raises NotFound where they are gone."""
        found = await to_thread.run_sync(self._jobs.events, job_id, after, PAGE, limiter=self._reading)
        if not found:
            raise NotFound(f"the events of job {job_id} are gone")
        return [(event.seq, _encoded(event)) for event in found]

    async def _run(self) -> None:
        while self._feeds:
            self._wake.clear()
            feeds = dict(self._feeds)
            try:
                has_more = await self._look(feeds)
            except Exception as error:  # its followers are told
                has_more = False
                for feed in feeds.values():
                    self._fail(feed, error)
            if not has_more:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll):
                        await self._wake.wait()

    async def _look(self, feeds: Mapping[str, _Feed]) -> bool:
        """Tell all of them what is new; whether there is more already."""
        lasts = {job_id: feed.last for job_id, feed in feeds.items()}
        found = await to_thread.run_sync(self._news, lasts, limiter=self._reading)
        has_more = False
        for job_id, feed in feeds.items():
            if job_id not in found:
                self._fail(feed, no_job(job_id))
                continue
            standing, events = found[job_id]
            before = feed.last
            if events:
                feed.add(events)
            else:  # at first what was before is read by whoever wants it, and later there is nothing
                feed.last = standing.num_events
            assert feed.last is not None
            is_behind = feed.last < standing.num_events
            feed.has_ended = standing.status.has_ended and not is_behind
            has_more |= is_behind
            if feed.last != before or feed.has_ended or self.is_ending():
                feed.notify()
        return has_more

    def _news(self, lasts: Mapping[str, int | None]) -> dict[str, tuple[Standing, list[Event]]]:
        # the number first: what has ended by then has no event that isn't read now
        found = {}
        for job_id, standing in self._jobs.standings(list(lasts)).items():
            last = lasts[job_id]
            is_new = last is not None and last < standing.num_events
            found[job_id] = (standing, self._jobs.events(job_id, last or 0, PAGE) if is_new else [])
        return found

    def _fail(self, feed: _Feed, error: Exception) -> None:
        """End it for its followers; the next one begins anew."""
        feed.error = error
        feed.notify()
        if self._feeds.get(feed.job_id) is feed:
            del self._feeds[feed.job_id]


def _encoded(event: Event) -> bytes:
    return b"id: %d\n" % event.seq + wire.event(EventAnswer.model_validate(event))
