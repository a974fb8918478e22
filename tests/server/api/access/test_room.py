"""Cheap refusals: if too many requests wait, if the queue is full, or if the disk is full."""

import asyncio
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from server.access.principal import Quota
from server.api import quotas
from server.api.job_feeds import JobFeeds
from server.api.lanes import Lane, Places, Turns
from server.engine.request import Grammar
from server.errors import QueueFull
from tests.server.api.access.key_kit import client_with, new_secret, two_projects
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.api.fakes import Caller, FakeEngine, http_scope, until
from tests.server.api.train_kit import ROWS, submit
from tests.server.conftest import BASE_NAME, MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

LONG = "word " * 1000
GENERATIONS: dict[str, dict[str, object]] = {
    "/generate": {"prompt": LONG, "adapter": "nobody", "regex": "a+"},
    "/compare": {"prompt": LONG, "adapters": ["base", "nobody"]},
    "/v1/completions": {"model": "nobody", "prompt": [LONG, LONG]},
    "/v1/chat/completions": {"model": "nobody", "messages": [{"role": "user", "content": LONG}]},
}


class Blocked:
    """Work that lasts until it is allowed to end."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.num_begun = 0

    def __call__(self, value: int) -> int:
        self.num_begun += 1
        assert self.go.wait(60)
        return value


def test_places_are_given_back() -> None:
    places = Places("things", 1)
    for _ in range(2):
        with suppress(KeyError), places.taken(""):
            with pytest.raises(QueueFull, match="too many things at once"):
                places.taken("").__enter__()
            raise KeyError
    with places.taken(""):
        pass


def test_a_project_leaves_some_to_others() -> None:
    places = Places("things", 8)
    for _ in range(6):
        places.take("greedy")
    with pytest.raises(QueueFull):
        places.take("greedy")
    places.take("other")
    places.take("other")
    with pytest.raises(QueueFull):
        places.take("other")
    places.give_back("greedy")
    places.take("other")


@pytest.mark.parametrize("path", GENERATIONS)
async def test_the_queue_is_asked_before_anything_is_done(
    path: str, client: httpx.AsyncClient, engine: FakeEngine, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_yet(*_: object) -> None:
        raise AssertionError

    engine.refusal = QueueFull(retry_after=7)
    for name in ("prompt", "messages", "continuation"):
        monkeypatch.setattr(app.state.services.encoder, name, not_yet)
    monkeypatch.setattr(app.state.services.library, "pin", not_yet)
    response = await client.post(path, json=GENERATIONS[path])
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    metrics = (await client.get("/metrics")).text
    assert 'smolora_requests_total{outcome="refused"} 1.0' in metrics


async def test_long_prompts_wait_in_a_bounded_queue(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = make_services()
    monkeypatch.setattr(services.encoder, "max_token_bytes", None)  # the tests' model reads 96 tokens
    work = Blocked()

    def encode(text: str) -> list[int]:
        return [work(1)]

    lane = Lane("encoding", "long prompts", Turns(1), 1)
    services = replace(services, limiters=replace(services.limiters, encoding=lane))
    monkeypatch.setattr(services.encoder, "prompt", encode)
    try:
        async with client_of(new_app(services)) as client:
            body = {"prompt": LONG, "max_tokens": 1}
            tasks = [asyncio.create_task(client.post("/generate", json=body)) for _ in range(2)]
            await until(lambda: work.num_begun == 1 and lane.num_waiting == 1)
            refused = await client.post("/generate", json=body)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
            work.go.set()
            assert [(await task).status_code for task in tasks] == [200, 200]
            assert 'smolora_requests_total{outcome="refused"} 1.0' in (await client.get("/metrics")).text
    finally:
        work.go.set()


HUGE = "1" * 200_000
HUGE_PROMPTS: dict[str, dict[str, object]] = {
    "/generate": {"prompt": HUGE},
    "/compare": {"prompt": "a", "adapters": ["base"], "score": [HUGE]},
    "/v1/completions": {"model": "base", "prompt": ["a", HUGE]},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": HUGE}]},
}


@pytest.mark.parametrize("path", HUGE_PROMPTS)
async def test_a_prompt_with_more_bytes_than_fit_is_refused_without_being_encoded_and_charged(
    path: str, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = app.state.services
    encode = services.encoder.prompt

    def encode_short(text: str) -> list[int]:
        assert len(text) < 99
        return [*encode(text)]

    monkeypatch.setattr(services.encoder, "prompt", encode_short)
    for name in ("messages", "continuation"):
        monkeypatch.setattr(services.encoder, name, lambda _: pytest.fail("it is encoded"))
    secret = new_secret(app, quota=Quota(tokens_per_minute=60_000))
    async with client_with(app, secret) as client:
        first = await client.post(path, json=HUGE_PROMPTS[path])
        assert first.status_code == (400 if path.startswith("/v1") else 422)
        assert "has 200,000 bytes, and the model's 96 tokens have at most" in first.text
        assert path not in ("/v1/completions", "/v1/chat/completions") or "context_length_exceeded" in first.text
        assert first.headers["x-ratelimit-remaining-tokens"] == "10000"  # 4 bytes per token
        assert (await client.post(path, json=HUGE_PROMPTS[path])).status_code == first.status_code
        refused = await client.post(path, json=HUGE_PROMPTS[path])
        assert (refused.status_code, refused.headers["x-ratelimit-remaining-tokens"]) == (429, "0")
        assert int(refused.headers["retry-after"]) >= 1


async def test_a_prompt_that_is_refused_after_encoding_is_charged(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.state.services.encoder, "max_token_bytes", None)
    async with client_with(app, new_secret(app, quota=Quota(tokens_per_minute=1000))) as client:
        body = {"prompt": LONG[:3000], "max_tokens": 1}
        refused = await client.post("/generate", json=body)
        assert refused.status_code == 422
        num_tokens = len(app.state.services.encoder.prompt(LONG[:3000]))
        assert num_tokens > 96
        assert refused.headers["x-ratelimit-remaining-tokens"] == str(max(0, 1000 - num_tokens))


async def test_a_prompt_is_not_encoded_after_its_client_left(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, work = make_services(), Blocked()
    lane = Lane("encoding", "long prompts", Turns(1), 9)
    services = replace(services, limiters=replace(services.limiters, encoding=lane))
    monkeypatch.setattr(services.encoder, "max_token_bytes", None)
    monkeypatch.setattr(services.encoder, "prompt", lambda text: [work(1)])
    app, body = new_app(services), {"prompt": LONG, "max_tokens": 1}
    try:
        stays, leaves = Caller(app, "/generate", body), Caller(app, "/generate", body)
        await until(lambda: work.num_begun == 1 and lane.num_waiting == 1)
        leaves.hang_up()
        await leaves.task
        assert (lane.num_waiting, leaves.sent) == (0, [])
        work.go.set()
        await stays.task
        assert (work.num_begun, stays.sent[0]["status"]) == (1, 200)
    finally:
        work.go.set()


async def test_refused_grammars_count_as_refused_requests(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, work = make_services(), Blocked()
    services = replace(
        services, limiters=replace(services.limiters, grammars=Lane("grammars", "grammars", Turns(1), 0))
    )
    monkeypatch.setattr(services.guidance, "check", lambda grammar: work(1))
    try:
        async with client_of(new_app(services)) as client:
            body = {"prompt": "a", "regex": "a+", "max_tokens": 1}
            first = asyncio.create_task(client.post("/generate", json=body))
            await until(lambda: work.num_begun == 1)
            assert (await client.post("/generate", json=body)).status_code == 429
            work.go.set()
            assert (await first).status_code == 200
            assert 'smolora_requests_total{outcome="refused"} 1.0' in (await client.get("/metrics")).text
    finally:
        work.go.set()


async def test_grammars_of_projects_take_turns(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project's grammar is compiled next, however many of another project's waited before it."""
    services, begun, ends = make_services(), list[str](), threading.Semaphore(0)

    def check(grammar: Grammar) -> None:
        begun.append(grammar.source)
        assert ends.acquire(timeout=60)

    monkeypatch.setattr(services.guidance, "check", check)
    lane = services.limiters.grammars
    bodies = [{"prompt": "a", "regex": f"a{number}", "max_tokens": 1} for number in range(6)]
    async with two_projects(new_app(services)) as projects:
        try:
            tasks = [asyncio.create_task(projects.acme.post("/generate", json=body)) for body in bodies[1:]]
            await until(lambda: lane.num_waiting == 4)
            tasks.append(asyncio.create_task(projects.other.post("/generate", json=bodies[0])))
            await until(lambda: lane.num_waiting == 5)
        finally:
            ends.release(99)
        assert [(await task).status_code for task in tasks] == [200] * 6
    assert begun[1] == "a0"


SHORT = "word " * 200
MANY: dict[str, dict[str, object]] = {
    "/v1/completions": {"model": "base", "prompt": [SHORT] * 8, "max_tokens": 1},
    "/compare": {"prompt": "a", "adapters": ["base"], "score": [SHORT] * 8, "max_tokens": 1},
    "/generate": {"messages": [{"role": "user", "content": ""}] * 200, "max_tokens": 1},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": ""}] * 200},
}


@pytest.mark.parametrize("path", MANY)
async def test_many_short_texts_are_a_long_one(
    path: str, client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred texts, each short enough for the event loop, blocked it for a tenth of a second and more."""
    encoder, threads = app.state.services.encoder, []
    monkeypatch.setattr(encoder, "max_token_bytes", None)

    def noting(encode: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def noted(*arguments: object, **options: object) -> list[int]:
            threads.append(threading.current_thread())
            return encode(*arguments, **options)

        return noted

    for name in ("prompt", "messages", "continuation"):
        monkeypatch.setattr(encoder, name, noting(getattr(encoder, name)))
    response = await client.post(path, json=MANY[path])
    assert response.status_code in (400, 422), response.text  # the tests' model is small
    is_score = path == "/compare"  # whose prompt is short
    assert threads[is_score:]
    assert threading.current_thread() not in threads[is_score:]


async def test_uploads_at_once_are_bounded(make_services: MakeServices) -> None:
    services = make_services()
    app = new_app(replace(services, limiters=replace(services.limiters, uploads=Places("uploads", 2))))
    started = 0
    gone = asyncio.Event()

    async def body() -> Message:
        nonlocal started
        started += 1
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/datasets", "headers": headers, "query_string": b""}
    tasks = [asyncio.create_task(app(dict(scope), body, send)) for _ in range(2)]
    await until(lambda: started == 2)
    async with client_of(app) as client:
        for path in ("/datasets", "/v1/files", "/adapters/a"):
            refused = await client.post(path, files=as_parts(*peft_files()))
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert (await client.post("/generate", json={"prompt": "a", "max_tokens": 1})).status_code == 200
        gone.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await client.post("/adapters/a", files=as_parts(*peft_files()))).status_code == 201


async def test_followers_of_events_are_bounded(make_services: MakeServices) -> None:
    services = make_services()
    services = replace(services, feeds=JobFeeds(services.jobs, poll=0.01, max_followers=2))
    app = new_app(services)
    async with client_of(app) as client:
        path = f"/train/{await submit(client)}/events"
        accept = [(b"accept", b"text/event-stream"), (b"host", b"localhost")]
        followers = [Caller(app, path, None, method="GET", headers=accept) for _ in range(2)]
        await until(lambda: all(follower.sent for follower in followers))
        refused = await client.get(path, headers={"Accept": "text/event-stream"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get(path)).status_code == 200
        followers[0].hang_up()
        await followers[0].task
        again = Caller(app, path, None, method="GET", headers=accept)
        await until(lambda: bool(again.sent))
        assert again.sent[0]["status"] == 200
        for follower in (again, followers[1]):
            follower.hang_up()
            await follower.task


async def test_a_disk_that_is_nearly_full(make_services: MakeServices, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["free"])
    free = (1 << 20) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free))
    async with client_of(new_app(make_services(min_free_bytes="1MiB"))) as client:
        job = {"name": "j", "data": ROWS}
        writes = [
            await client.post("/datasets", files={"file": ("a.jsonl", b'{"text": "a"}')}),
            await client.post(
                "/v1/files", files={"file": ("a.jsonl", b'{"text": "a"}')}, data={"purpose": "fine-tune"}
            ),
            await client.post("/adapters/a", files=as_parts(*peft_files())),
            await client.post("/train", json=job),
            await client.post("/v1/fine_tuning/jobs", json={"model": "base", "training_file": "file-a"}),
            await client.post("/compositions/a", json={"expression": "a*0.5+b*0.5", "method": "ties"}),
            await client.post("/evaluate", json={"adapters": ["base"], "datasets": ["ds-a"]}),
        ]
        for response in writes:
            assert response.status_code == 503, response.text
            assert "SMOLORA_MIN_FREE_BYTES" in response.text
            assert int(response.headers["retry-after"]) >= 1
        assert (await client.post("/train?dry_run=true", json=job)).status_code == 200
        assert (await client.post("/generate", json={"prompt": "a", "max_tokens": 1})).status_code == 200
        free += 1
        assert (await client.post("/train", json=job)).status_code == 202


PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'


class Upload:
    """An upload of a data set, piece by piece."""

    def __init__(self, app: FastAPI, announced: int | None) -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
        headers += [] if announced is None else [(b"content-length", str(announced).encode())]
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.answer: list[Message] = []
        scope = http_scope("POST", "/datasets", headers)
        self.task = asyncio.ensure_future(app(scope, self._inbox.get, self._send))

    @classmethod
    async def begin(cls, app: FastAPI, announced: int | None) -> "Upload":
        """Send the headers and the first piece, and wait until it is read, or answered."""
        upload = cls(app, announced)
        await upload.send(PART)
        return upload

    @property
    def status(self) -> int | None:
        return self.answer[0]["status"] if self.answer else None

    async def send(self, piece: bytes) -> None:
        """Send the piece, and wait until it is read."""
        self._inbox.put_nowait({"type": "http.request", "body": piece, "more_body": True})
        await until(lambda: self._inbox.empty() or self.task.done())

    async def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})
        await asyncio.wait({self.task})

    async def _send(self, message: Message) -> None:
        self.answer.append(message)


MIB = 1 << 20


async def test_announced_bytes_of_uploads_leave_the_least_free(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(250 * MIB))
    app = new_app(make_services(min_free_bytes="50MiB"))
    first, second = [await Upload.begin(app, 100 * MIB) for _ in range(2)]
    third = await Upload.begin(app, MIB)
    await third.leave()
    assert (first.status, second.status, third.status) == (None, None, 503)
    await first.leave()
    fourth = await Upload.begin(app, 100 * MIB)
    assert fourth.status is None
    for upload in (second, fourth):
        await upload.leave()


async def test_an_upload_ends_once_the_disk_is_nearly_full(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["free"])
    free = 100 * MIB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free))
    monkeypatch.setattr(quotas, "CHECK_BYTES", 4 * 1000)
    app = new_app(make_services(min_free_bytes="50MiB"))
    upload = await Upload.begin(app, None)
    await upload.send(b" " * 5000)
    assert upload.answer == []
    free = 50 * MIB - 1
    await upload.send(b" " * 2000)
    assert not upload.task.done()
    await upload.send(b" " * 3000)
    await upload.leave()
    assert upload.status == 503
    assert b"SMOLORA_MIN_FREE_BYTES" in upload.answer[1]["body"]


async def test_repeated_submission_is_answered_under_overload(
    make_services: MakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job exists already: a refused client would submit it once more later."""
    usage = namedtuple("usage", ["free"])
    free = 2 << 20  # includes what uploads announce
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free))
    async with client_of(new_app(make_services(min_free_bytes="1MiB"))) as client:
        for name in "ab":
            assert (await client.post(f"/adapters/{name}", files=as_parts(*peft_files()))).status_code == 201
        file = await client.post(
            "/v1/files", files={"file": ("a.jsonl", b'{"text": "a"}')}, data={"purpose": "fine-tune"}
        )
        job = {"name": "j", "data": ROWS}
        fine_tuning = {"model": BASE_NAME, "training_file": file.json()["id"], "suffix": "f"}
        merge = {"expression": "a*0.5+b*0.25", "method": "ties"}
        dataset = await client.post("/datasets", files={"file": ("a.jsonl", b'{"text": "a"}')})
        measured = {"adapters": ["a"], "datasets": [dataset.json()["id"]]}
        bodies = {"/train": job, "/v1/fine_tuning/jobs": fine_tuning, "/compositions/m": merge}
        bodies["/evaluate"] = measured
        firsts = {}
        for number, (path, body) in enumerate(bodies.items()):
            headers = {"Idempotency-Key": f"key-{number}"}
            firsts[path] = await client.post(path, json=body, headers=headers)
            assert firsts[path].is_success, firsts[path].text
        free = (1 << 20) - 1
        for number, (path, body) in enumerate(bodies.items()):
            again = await client.post(path, json=body, headers={"Idempotency-Key": f"key-{number}"})
            assert (again.status_code, again.json()["id"]) == (firsts[path].status_code, firsts[path].json()["id"])
            assert (await client.post(path, json=body)).status_code == 503


async def test_a_generation_that_takes_too_long(make_services: MakeServices, engine: FakeEngine) -> None:
    engine.hold_after = 1
    async with client_of(new_app(make_services(request_timeout=2.0))) as client:  # its first piece arrives earlier
        stream = await client.post("/generate", json={"prompt": "a", "stream": True})
        assert stream.status_code == 200
        assert stream.text.count("event: error") == 1
        assert "SMOLORA_REQUEST_TIMEOUT" in stream.text.rpartition("event: error")[2]
    async with client_of(new_app(make_services(request_timeout=0.1))) as client:
        for path, body in GENERATIONS.items():
            base = {key: value for key, value in body.items() if key not in ("adapter", "regex")}
            base |= {"model": "base"} if "model" in body else {}
            base |= {"adapters": ["base"]} if "adapters" in body else {}
            base |= {"prompt": "a"} if "prompt" in body else {"messages": [{"role": "user", "content": "a"}]}
            response = await client.post(path, json={**base, "max_tokens": 4})
            assert response.status_code == 504, response.text
            assert "SMOLORA_REQUEST_TIMEOUT" in response.text
            assert "retry-after" not in response.headers  # a retry would take as long
            assert response.headers.get("x-should-retry") == ("false" if path.startswith("/v1") else None)
    assert engine.open == set()
