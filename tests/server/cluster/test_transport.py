"""An API process's connection to the replicas, with a finder that this test writes."""

import asyncio
import logging
import sys
from importlib import import_module
from pathlib import Path

import anyio
import pytest

pytest.importorskip("ray.serve", reason="needs the extra cluster")
transport = import_module("server.cluster.transport")

pytestmark = [pytest.mark.cluster, pytest.mark.anyio]

FINDER = """#!/bin/sh
echo "$@" >> {asked}
echo '{{"replicas": {{"one": "127.0.0.1:1", "two": "127.0.0.1:2"}}}}'
echo '{{"fault": "no Ray cluster"}}'
exit 1
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have finders report two replicas and a fault, and end. Return the file with a line for each finder."""
    program, asked = tmp_path / "python", tmp_path / "asked"
    program.write_text(FINDER.format(asked=asked))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(transport, "_RESTART_SECONDS", 0.01)
    return asked


async def test_a_finder_that_ends_is_replaced_and_replicas_stay_known(
    asked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reported, enough = list[frozenset[str]](), asyncio.Event()

    def on_change(ids: frozenset[str]) -> None:
        reported.append(ids)
        if len(reported) == 3:
            enough.set()

    with caplog.at_level(logging.WARNING, transport.__name__):
        replicas = transport.ReplicaTransport("10.0.0.1:6379")
        replicas.watch(on_change)
        with anyio.fail_after(60):
            await enough.wait()
        await replicas.close()
    assert set(reported) == {frozenset({"one", "two"})}
    assert asked.read_text().splitlines()[0].startswith("-P -m server.cluster.finder 10.0.0.1:6379 ")
    assert "is tried again: no Ray cluster" in caplog.messages[0]
    with pytest.raises(ConnectionError, match="the replica is gone"):
        await replicas.submit("three", "client", None)


async def test_a_finder_that_can_not_start_is_tried_again(
    asked: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program, found = sys.executable, asyncio.Event()
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    replicas = transport.ReplicaTransport("10.0.0.1:6379")
    with caplog.at_level(logging.WARNING, transport.__name__):
        replicas.watch(lambda _: found.set())
        with anyio.fail_after(60):
            while not caplog.messages:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(sys, "executable", program)
            await found.wait()
        await replicas.close()
    assert "FileNotFoundError" in caplog.messages[0]
