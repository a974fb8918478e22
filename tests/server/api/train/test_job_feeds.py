"""Many followers of a job's events cost as much as one, and don't delay anything else."""

import asyncio
import threading
from collections.abc import Sequence
from datetime import UTC, datetime

import anyio
import httpx
import pytest
import sqlalchemy as sa
from anyio import to_thread
from fastapi import FastAPI

from adapters.errors import NotFound
from server.api.job_feeds import PAGE, Follower, JobFeeds
from server.jobs.jobs import Event, Standing, Status
from server.jobs.leases import Leases
from tests.server.api.fakes import Caller, until
from tests.server.api.train_kit import StandIn, submit

pytestmark = pytest.mark.anyio

NUM_FOLLOWERS = 50


class FakeJobs:
    """Jobs in memory that count calls; `failure` is raised instead."""

    def __init__(self, **num_events: int) -> None:
        self.num_events = num_events
        self.ended: set[str] = set()
        self.failure: Exception | None = None
        self.num_looks = 0
        self.reads: list[tuple[str, int]] = []
        self.threads: set[int] = set()

    def standings(self, job_ids: Sequence[str]) -> dict[str, Standing]:
        self.num_looks += 1
        self.threads.add(threading.get_ident())
        if self.failure is not None:
            raise self.failure
        return {
            job_id: Standing(Status.SUCCEEDED if job_id in self.ended else Status.RUNNING, self.num_events[job_id])
            for job_id in job_ids
            if job_id in self.num_events
        }

    def events(self, job_id: str, after: int, limit: int) -> list[Event]:
        self.reads.append((job_id, after))
        self.threads.add(threading.get_ident())
        seqs = range(after + 1, min(after + limit, self.num_events[job_id]) + 1)
        return [Event(seq, datetime.now(UTC), "info", "message", f"{job_id} {seq}", {}) for seq in seqs]


class Listener:
    """A follower of a job that records the numbers of its events."""

    def __init__(self, feeds: JobFeeds, job_id: str, after: int = 0) -> None:
        self.seqs: list[int] = []
        self.num_comments = 0
        self.go_on = asyncio.Event()  # clear: it reads nothing for now
        self.go_on.set()
        self.task = asyncio.ensure_future(self._listen(feeds.follow(job_id, after)))

    async def _listen(self, follower: Follower) -> None:
        try:
            async for piece in follower.stream():
                if piece.startswith(b":"):
                    self.num_comments += 1
                else:
                    self.seqs.append(int(piece.partition(b"\n")[0].removeprefix(b"id: ")))
                await self.go_on.wait()
        finally:
            await follower.close()


async def test_followers_share_one_query() -> None:
    jobs = FakeJobs(a=3, b=1)
    feeds = JobFeeds(jobs, poll=0.002)
    listeners = [Listener(feeds, job_id) for job_id in ("a", "b") for _ in range(NUM_FOLLOWERS)]
    await until(lambda: all(listener.seqs for listener in listeners))
    assert len(jobs.reads) == 2 * NUM_FOLLOWERS, "each reads once what was before it came"
    looks = jobs.num_looks
    await until(lambda: jobs.num_looks >= looks + 20)
    assert len(jobs.reads) == 2 * NUM_FOLLOWERS, "nothing is read while nothing happens"
    jobs.num_events["a"] += 2
    await until(lambda: all(listener.seqs == [1, 2, 3, 4, 5] for listener in listeners[:NUM_FOLLOWERS]))
    assert jobs.reads[2 * NUM_FOLLOWERS :] == [("a", 3)], "one reads for all"
    assert all(listener.seqs == [1] for listener in listeners[NUM_FOLLOWERS:])
    jobs.ended |= {"a", "b"}
    await asyncio.wait_for(asyncio.gather(*(listener.task for listener in listeners)), 60)
    await until(lambda: not feeds.is_polling)


async def test_feed_ends_with_its_last_follower_and_restarts() -> None:
    jobs = FakeJobs(a=1)
    feeds = JobFeeds(jobs, poll=60)  # so that it doesn't end by a timeout
    assert (feeds.is_polling, jobs.num_looks) == (False, 0)
    first, second = Listener(feeds, "a"), Listener(feeds, "a")
    await until(lambda: first.seqs == second.seqs == [1])
    first.task.cancel()
    await until(first.task.done)
    assert feeds.is_polling
    second.task.cancel()
    await until(lambda: not feeds.is_polling)
    looks = jobs.num_looks
    third = Listener(feeds, "a", after=1)
    await until(lambda: third.num_comments == 1)
    assert feeds.is_polling
    assert jobs.num_looks == looks + 1
    fourth = Listener(feeds, "a")
    await until(lambda: fourth.seqs == [1])
    assert jobs.num_looks == looks + 1, "somebody has looked"
    third.task.cancel()
    fourth.task.cancel()
    await until(lambda: not feeds.is_polling)


async def test_a_new_job_is_looked_at_at_once() -> None:
    jobs = FakeJobs(a=1, b=2)
    feeds = JobFeeds(jobs, poll=60)
    first = Listener(feeds, "a")
    await until(lambda: first.seqs == [1])
    second = Listener(feeds, "b")
    await until(lambda: second.seqs == [1, 2])
    for listener in (first, second):
        listener.task.cancel()
    await until(lambda: not feeds.is_polling)


async def test_slow_follower_reads_for_itself() -> None:
    jobs = FakeJobs(a=0)
    feeds = JobFeeds(jobs, poll=0.001)
    quick, slow = Listener(feeds, "a"), Listener(feeds, "a")
    await until(lambda: quick.num_comments == slow.num_comments == 1)
    slow.go_on.clear()
    jobs.num_events["a"] = 3 * PAGE + 7
    await until(lambda: len(quick.seqs) == 3 * PAGE + 7)
    jobs.ended.add("a")
    slow.go_on.set()
    await asyncio.wait_for(asyncio.gather(quick.task, slow.task), 60)
    assert quick.seqs == slow.seqs == list(range(1, 3 * PAGE + 8))


async def test_events_that_come_with_the_end_are_not_lost() -> None:
    jobs = FakeJobs(a=2)
    feeds = JobFeeds(jobs, poll=0.001)
    listener = Listener(feeds, "a")
    await until(lambda: listener.seqs == [1, 2])
    jobs.num_events["a"] = 2 * PAGE + 10
    jobs.ended.add("a")
    await asyncio.wait_for(listener.task, 60)
    assert listener.seqs == list(range(1, 2 * PAGE + 11))


async def test_errors_reach_every_follower_and_the_next_starts_again() -> None:
    jobs = FakeJobs(a=1)
    feeds = JobFeeds(jobs, poll=0.001)
    listeners = [Listener(feeds, "a") for _ in range(3)]
    await until(lambda: all(listener.seqs for listener in listeners))
    jobs.failure = RuntimeError("no disk")
    found = await asyncio.gather(*(listener.task for listener in listeners), return_exceptions=True)
    assert found == [jobs.failure] * 3
    await until(lambda: not feeds.is_polling)
    jobs.failure = None
    nobody, again = Listener(feeds, "nobody"), Listener(feeds, "a")
    with pytest.raises(NotFound):
        await nobody.task
    assert nobody.num_comments == 0, "before anything was sent"
    await until(lambda: again.seqs == [1])
    del jobs.num_events["a"]
    with pytest.raises(NotFound):
        await again.task
    await until(lambda: not feeds.is_polling)


async def test_streams_end_if_their_events_were_removed() -> None:
    class Gone(FakeJobs):
        def events(self, job_id: str, after: int, limit: int) -> list[Event]:
            return [event for event in super().events(job_id, after, limit) if event.seq <= 2]

    jobs = Gone(a=5)
    feeds = JobFeeds(jobs, poll=0.001)
    behind, there = Listener(feeds, "a"), Listener(feeds, "a", after=5)
    with pytest.raises(NotFound):
        await behind.task
    assert behind.seqs == [1, 2]
    jobs.num_events["a"] = 6
    with pytest.raises(NotFound):
        await asyncio.wait_for(there.task, 60)
    await until(lambda: not feeds.is_polling)


async def test_server_shutdown_ends_event_streams() -> None:
    jobs = FakeJobs(a=1)
    is_ending = False
    feeds = JobFeeds(jobs, lambda: is_ending, poll=0.001)
    listener = Listener(feeds, "a")
    await until(lambda: listener.seqs == [1])
    is_ending = True
    await asyncio.wait_for(listener.task, 60)


async def test_followers_take_few_threads() -> None:
    jobs = FakeJobs(a=1)
    feeds = JobFeeds(jobs, poll=0.001)
    listeners = [Listener(feeds, "a") for _ in range(NUM_FOLLOWERS)]
    await until(lambda: jobs.num_looks > 50 and all(listener.seqs for listener in listeners))
    assert len(jobs.threads) <= 2
    assert threading.get_ident() not in jobs.threads
    jobs.ended.add("a")
    await asyncio.gather(*(listener.task for listener in listeners))


async def followers_of(app: FastAPI, job_id: str) -> list[Caller]:
    """Make many clients of the route; each has received all events so far."""
    accept = [(b"accept", b"text/event-stream")]
    callers = [Caller(app, f"/train/{job_id}/events", None, "GET", accept) for _ in range(NUM_FOLLOWERS)]
    await until(lambda: all(_num_events(caller) == 1 for caller in callers))
    return callers


def _num_events(caller: Caller) -> int:
    return sum(message.get("body", b"").count(b"id: ") for message in caller.sent)


async def test_many_clients_ask_the_database_once(
    app: FastAPI, client: httpx.AsyncClient, leases: Leases, database: sa.Engine
) -> None:
    callers = await followers_of(app, await submit(client))
    statements: list[str] = []
    sa.event.listen(database, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    worker = StandIn(leases)
    await until(lambda: all(_num_events(caller) == 2 for caller in callers))
    asked = [text for text in statements if text.startswith("SELECT") and "job_events" in text]
    assert len(asked) == 1, "the new event is read once"
    worker.succeed()
    await asyncio.wait_for(asyncio.gather(*(caller.task for caller in callers)), 60)


async def test_followers_have_threads_of_their_own(
    app: FastAPI, client: httpx.AsyncClient, leases: Leases
) -> None:
    callers = await followers_of(app, await submit(client))
    worker = StandIn(leases)
    release = threading.Event()

    async def take_a_thread() -> None:
        await to_thread.run_sync(release.wait)

    async with anyio.create_task_group() as tasks:
        for _ in range(int(to_thread.current_default_thread_limiter().total_tokens)):
            tasks.start_soon(take_a_thread)
        try:
            await until(lambda: all(_num_events(caller) == 2 for caller in callers))
        finally:
            release.set()
    worker.succeed()
    await asyncio.wait_for(asyncio.gather(*(caller.task for caller in callers)), 60)
