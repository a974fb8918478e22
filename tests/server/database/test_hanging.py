"""A PostgreSQL that accepts connections and answers nothing: its processes are stopped.

Bounds are far above what is expected on an idle machine, and far below the minutes for which threads once waited.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.errors import Interrupted, Silent
from adapters.expression import Term
from adapters.sql import reader_of
from server.access.keys import Keys
from server.access.principal import OPERATOR, SCOPES
from server.database import commits_of, connect, silence_of
from server.storage.home import Home
from tests.end_to_end.server_process import ServerProcess
from tests.kits.postgres import CLUSTER, Postgres
from tests.kits.tiny import save_tiny_base
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.running import Running, running

pytestmark = CLUSTER

LONG = 60.0
"""Seconds within which every wait must end, on a busy machine. Without deadlines they end with the hang."""


@contextmanager
def hanging(server: Postgres) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


def until(condition: Callable[[], bool], seconds: float = 2 * LONG) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def publish(catalog: Catalog) -> int:
    return catalog.publish("a", digest="0" * 64, rank=1, alpha=1, target_modules=[], parameters=1, bytes=1).version


def in_time(work: Callable[[], object]) -> BaseException | None:
    """Return the error that `work` raises. It must end in time."""
    began = time.monotonic()
    try:
        work()
    except Exception as error:
        return error
    finally:
        assert time.monotonic() - began < LONG
    return None


def test_no_thread_waits_for_a_hanging_server(postgres: Postgres, tmp_path: Path) -> None:
    """All end with an error in the first seconds, and at once later. Then everything works again."""
    engine = connect(tmp_path, url=postgres.migrated())
    catalog, silent_for = Catalog(engine), silence_of(engine)
    assert publish(catalog) == 1
    commits = commits_of(engine, tmp_path)
    until(lambda: commits() == commits())
    with hanging(postgres), ThreadPoolExecutor(40) as pool:
        work = [lambda: catalog.resolve([Term("a")]), lambda: publish(catalog)] * 20
        errors = list(pool.map(in_time, work))
        assert all(isinstance(error, Interrupted) for error in errors), errors
        until(lambda: silent_for() > 0)
        began = time.monotonic()
        later = list(pool.map(in_time, work))
        assert sum(isinstance(error, Silent) for error in later) > 30
        assert time.monotonic() - began < LONG
    until(lambda: silent_for() == 0)
    assert catalog.resolve([Term("a")])[0].version == 1, "what failed was not done"
    assert publish(catalog) == 2
    engine.dispose()


def test_a_process_that_does_not_listen_gives_up_too(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example a worker."""
    monkeypatch.setattr("server.database.postgres._ANSWER_SECONDS", 1.0)
    engine = connect(tmp_path, url=postgres.migrated(), patience=0.0)
    catalog = Catalog(engine)
    assert catalog.list() == []
    with hanging(postgres):
        assert isinstance(in_time(catalog.list), Interrupted)
    until(lambda: in_time(catalog.list) is None)
    engine.dispose()


def test_the_server_ends_slow_statements_itself(postgres: Postgres, tmp_path: Path) -> None:
    engine = connect(tmp_path, url=postgres.migrated(), patience=0.0)
    with reader_of(engine).connect() as connection:
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() == "15s"
        connection.exec_driver_sql("SET statement_timeout = '50ms'")
        with pytest.raises(Interrupted):
            connection.exec_driver_sql("SELECT pg_sleep(60)")
    engine.dispose()


def test_a_read_whose_session_ends_is_repeated(postgres: Postgres, tmp_path: Path) -> None:
    """Also if it ends in the midst of the statement."""
    engine = connect(tmp_path, url=postgres.migrated(), patience=60.0)
    slow = sa.text("SELECT count(*) FROM (SELECT pg_sleep(0.5)) AS slept")
    running = "query LIKE 'SELECT count%' AND state = 'active'"
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {running}"
    ended: list[object] = []

    def has_ended_one() -> bool:
        ended.extend(postgres._run(end))
        return bool(ended)

    def end_sessions() -> None:
        until(has_ended_one)

    thread = threading.Thread(target=end_sessions)
    with reader_of(engine).connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        thread.start()
        assert connection.execute(slow).scalar_one() == 1
    thread.join()
    assert ended
    engine.dispose()


def test_sigterm_ends_a_server_whose_database_hangs(postgres: Postgres, tmp_path: Path) -> None:
    url, home = postgres.migrated(), tmp_path / "home"
    server = ServerProcess(home, model=save_tiny_base(tmp_path / "base"), database_url=url, workers=1)
    try:
        with hanging(postgres), ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(httpx.get, f"{server.url}/adapters", timeout=2 * LONG) for _ in range(4)]
            time.sleep(0.5)  # most likely they wait for the database
            began = time.monotonic()
            server.process.terminate()
            assert server.process.wait(2 * LONG) == 0
            assert time.monotonic() - began < LONG
            assert {one.result().status_code for one in waiting} <= {200, 503}
    finally:
        server.close()


@contextmanager
def serving(server: Postgres, home: Path, **settings: object) -> Iterator[tuple[Running, str]]:
    """Run a server with a key and an adapter `a`. Yield it and the key's secret."""
    url = server.migrated()
    base = save_tiny_base(home / "base")
    engine = connect(home, url=url)
    secret = Keys(engine, Home(home).keyed).create("one", who=OPERATOR, scopes=SCOPES)[1]
    engine.dispose()
    with running(home, base, database_url=url, bytes_url=f"file://{home}/bytes", **settings) as found:
        yield found, secret


def client_of(server: Running, secret: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {secret}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=3 * LONG, trust_env=False)


def test_known_names_and_keys_are_served_while_the_database_hangs(postgres: Postgres, tmp_path: Path) -> None:
    with serving(postgres, tmp_path) as (server, secret), client_of(server, secret) as client:
        shape = server.services.library.shape
        for name in ("known", "unknown"):
            assert client.post(f"/adapters/{name}", files=as_parts(*peft_files(1, shape=shape))).status_code == 201
        limited = client.post("/keys", json={"name": "limited", "requests_per_minute": 2}).json()["secret"]
        body = {"prompt": "a", "max_tokens": 4, "temperature": 0, "adapter": "known"}
        expected = client.post("/generate", json=body).json()["choices"]
        of_limited = {"Authorization": f"Bearer {limited}"}
        assert client.post("/generate", json=body, headers=of_limited).status_code == 200
        assert client.get("/ready").json()["degraded"] == []
        with hanging(postgres):
            answers = [client.post("/generate", json=body) for _ in range(3)]
            assert [answer.json().get("choices") for answer in answers] == [expected] * 3
            until(lambda: client.get("/ready").json()["degraded"] == ["the database doesn't answer"])
            assert client.get("/ready").status_code == 200
            refused = client.post("/generate", json={**body, "adapter": "unknown"})
            assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
            assert client.get("/adapters").status_code == 503
            metrics = client.get("/metrics")
            assert (metrics.status_code, "smolora_ready 1.0" in metrics.text) == (200, True)
            codes = [client.post("/generate", json=body, headers=of_limited).status_code for _ in range(3)]
            assert codes == [200, 200, 429], "counted in this process"
            unknown = client.post("/generate", json=body, headers={"Authorization": "Bearer sk-smolora-no"})
            assert unknown.status_code == 503, "it may have been made elsewhere"
        until(lambda: client.get("/ready").json().get("degraded") == [])
        assert client.post("/generate", json={**body, "adapter": "unknown"}).status_code == 200


@pytest.mark.parametrize("settings", [{"stale_names": 0, "stale_keys": 300}, {"stale_keys": 0}])
def test_not_ready_if_nothing_may_be_served_without_the_database(
    postgres: Postgres, tmp_path: Path, settings: dict[str, object]
) -> None:
    with serving(postgres, tmp_path, **settings) as (server, secret), client_of(server, secret) as client:
        with hanging(postgres):
            until(lambda: client.get("/ready").status_code == 503)
            generated = client.post("/generate", json={"prompt": "a", "max_tokens": 1})
            assert generated.status_code == (200 if settings["stale_keys"] else 503)
            assert "smolora_ready 0.0" in client.get("/metrics").text
        until(lambda: client.get("/ready").status_code == 200)
