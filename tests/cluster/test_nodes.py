"""Two machines, as two Ray nodes with a HOME each, are upgraded and restarted in turn: no request fails."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from server.cluster.node import FILE_NAME
from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from tests.cluster.conftest import needs_ray
from tests.cluster.kit import wait_until
from tests.cluster.load import load_on
from tests.cluster.machines import UpProcess, is_ready
from tests.end_to_end.server_process import PATIENCE, ServerProcess, free_port
from tests.kits.postgres import CLUSTER, Postgres
from tests.server.api.adapters.peft_files import as_parts, peft_files

pytestmark = [*CLUSTER, needs_ray]

Machines = tuple[UpProcess, UpProcess]


@pytest.fixture
def machines(
    postgres: Postgres, bytes_url: str, long_base: Path, single: ServerProcess, tmp_path: Path
) -> Iterator[Machines]:
    """Start one machine with two API processes and a worker, and one with an API process. Each has one core: room
    for one replica."""
    shared = (postgres.migrated(), bytes_url, long_base)
    ray_port = free_port()
    with ExitStack() as stack:
        first = UpProcess(
            tmp_path / "first", free_port(2), *shared, ray_port=ray_port, cpus=1, replicas=1, api=2, workers=1
        )
        stack.callback(first.close)
        first.wait(2)
        address = f"127.0.0.1:{ray_port}"
        second = UpProcess(tmp_path / "second", free_port(), *shared, address=address, cpus=1, api=1)
        stack.callback(second.close)
        second.wait(1)
        first.call("deploy", address=address, replicas=2, workers=1)
        yield first, second


def text_of(url: str, prompt: str, **fields: object) -> str:
    body = {"prompt": prompt, "temperature": 0, **fields}
    response = httpx.post(f"{url}/generate", json=body, timeout=PATIENCE, trust_env=False)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_two_machines(machines: Machines, single: ServerProcess, long_base: Path) -> None:
    first, second = machines
    urls = [*first.urls, *second.urls]
    replicas = [first.replicas(), second.replicas()]
    assert [len(found) for found in replicas] == [1, 1]

    shape = load_base(resolve_base(str(long_base), first.home)).config.shape
    published = httpx.post(
        f"{urls[0]}/adapters/left", files=as_parts(*peft_files(0, shape=shape)), timeout=60, trust_env=False
    )
    assert published.status_code == 201, published.text
    expected = single.text("On another machine", max_tokens=20, adapter="left")
    assert text_of(urls[2], "On another machine", max_tokens=20, adapter="left") == expected

    with load_on(urls, single) as load:
        # Both are full: an old replica ends before its replacement starts.
        first.call("deploy", address=first.address, replicas=2, max_queue=17, workers=1)
        found = [first.replicas(), second.replicas()]
        assert [len(pids) for pids in found] == [1, 1]
        assert not {*replicas[0], *replicas[1]} & {*found[0], *found[1]}
        load.wait_for(12)

        before = first.children()
        assert len(before) == 3
        assert "2 API processes and 1 workers" in first.call("restart")
        after = first.children()
        assert len(after) == 3
        assert not before & after
        load.wait_for(12)
    assert load.faults == []

    assert "replicas: 2 running" in first.call("status")
    second.call("down")
    assert second.process.wait(PATIENCE) == 0
    assert not (second.home / FILE_NAME).exists()
    wait_until(lambda: text_of(urls[0], "It goes on", max_tokens=4) != "", "the first doesn't go on")


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[str]:
    """Run a Valkey; yield its address."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        pytest.skip("there is neither valkey-server nor redis-server")
    port = free_port()
    options = ["--port", str(port), "--dir", str(tmp_path), "--save", "", "--daemonize", "no"]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    yield f"127.0.0.1:{port}"
    server.terminate()
    server.wait()


def test_other_machines_replicas_outlive_a_head_whose_state_is_kept(
    valkey: str, postgres: Postgres, bytes_url: str, long_base: Path, single: ServerProcess, tmp_path: Path
) -> None:
    shared = (postgres.migrated(), bytes_url, long_base)
    ray_port = free_port()
    with ExitStack() as stack:
        first = UpProcess(
            *(tmp_path / "first", free_port(), *shared),
            variables={"RAY_REDIS_ADDRESS": valkey},
            ray_port=ray_port,
            cpus=1,
            replicas=1,
            api=1,
        )
        stack.callback(first.close)
        first.wait(1)
        second = UpProcess(
            tmp_path / "second", free_port(), *shared, address=f"127.0.0.1:{ray_port}", cpus=1, api=1
        )
        stack.callback(second.close)
        second.wait(1)
        first.call("deploy", address=first.address, replicas=2)
        kept, lost = second.replicas(), first.replicas()
        assert (len(kept), len(lost)) == (1, 1)
        with load_on(second.urls, single) as load:
            first.head().kill()
            wait_until(lambda: not set(lost) & set(psutil.pids()), "the head's replica runs on")
            faults = len(load.faults)
            load.wait_for(12)
            wait_until(lambda: "replicas: 2 running" in first.call("status"), first.log(), PATIENCE)
            load.wait_for(12)
            assert len(load.faults) == faults, "only requests on the head's replica failed"
        assert second.replicas() == kept
        assert is_ready(first.urls[0])
