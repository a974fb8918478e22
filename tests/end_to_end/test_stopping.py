"""Signals to a real process with running, waiting and training work, and to one that hangs."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.serve.process import DRAIN_SECONDS, HURRY_SECONDS
from tests.end_to_end.server_process import PATIENCE, ServerProcess, command, environment
from tests.end_to_end.training_client import CHILD, code_rows, get, processes, submit, succeeded, wait_until
from tests.kits.hanging_server import HANG, HANG_NOW
from tests.server.jobs.test_worker import stop
from tests.server.test_hanging_server import BODY, Process

LONG = {"prompt": "a", "max_tokens": 400, "temperature": 0, "ignore_eos": True, "speculation": "off"}
NUM_CHOICES, NUM_TOKENS = 3, 200  # few enough to end in time on a busy machine
JOB = {"epochs": 120, "batch_size": 4, "max_length": 32, "checkpoint_steps": 1000}


def start(home: Path, model: Path) -> ServerProcess:
    return ServerProcess(home, model=model, workers=1, max_num_seqs=2, max_model_len=512, train_share=1.0)


def num_sequences(server: ServerProcess) -> float:
    """Return the number of running and waiting sequences."""
    found = server.metrics()
    return found["smolora_requests_running"] + found["smolora_requests_waiting"]


@pytest.fixture
def server(tmp_path: Path, converted_tiny: Path) -> Iterator[ServerProcess]:
    server = start(tmp_path / "home", converted_tiny)
    yield server
    server.close()


@pytest.mark.thorough  # a server without a job: test_processes.py; a job that leaves: test_worker.py
def test_requests_end_and_the_job_continues_after_a_signal(server: ServerProcess, converted_tiny: Path) -> None:
    """Two of the four requests' sequences run at a time. The job writes its last checkpoint as it leaves."""
    job_id = submit(server, name="codes", data=code_rows(16), training={**JOB, "epochs": 60})
    wait_until(lambda: get(server, f"/train/{job_id}")["progress"].get("step", 0) > 5)
    (child,) = processes(server, CHILD)
    stop(server.home, child.pid)  # otherwise it may end before the requests have begun
    body = {**LONG, "n": NUM_CHOICES, "max_tokens": NUM_TOKENS}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            streams = [
                pool.submit(server.client.post, "/generate", json={**body, "stream": True}) for _ in range(2)
            ]
            wholes = [pool.submit(server.client.post, "/generate", json=body) for _ in range(2)]
            asked = (*streams, *wholes)
            # More sequences than three requests have: all four were accepted. True until one request's worth has
            # ended.
            wait_until(
                lambda: num_sequences(server) > 3 * NUM_CHOICES or any(one.done() for one in asked)  # noqa: B023
            )
            if not any(one.done() for one in asked):
                break
            wait_until(lambda: all(one.done() for one in asked))  # noqa: B023  a busy machine looked too late
        else:
            raise AssertionError("it never ran all four when it was looked at")
        server.terminate()
        signalled = time.monotonic()
        child.resume()
        while server.client.get("/ready").status_code == 200:
            assert time.monotonic() - signalled < 1, "it is not ready at once"
        for path in ("/generate", "/train", "/adapters/a"):
            refused = server.client.post(path, json=LONG)
            assert refused.status_code == 503, path
            assert int(refused.headers["retry-after"]) >= 1
        assert [stream.result().text.endswith("data: [DONE]\n\n") for stream in streams] == [True, True]
        assert [whole.result().json()["usage"]["completion_tokens"] for whole in wholes] == [
            NUM_CHOICES * NUM_TOKENS
        ] * 2
    assert server.exit_code() == 0
    assert time.monotonic() - signalled < DRAIN_SECONDS
    checkpoints = server.home / "jobs" / job_id / "checkpoints"
    (left,) = [path.name for path in checkpoints.iterdir()]
    assert int(left.partition("-")[2]) > 5
    again = start(server.home, converted_tiny)
    try:
        job = succeeded(again, job_id)
        events = get(again, f"/train/{job_id}/events")
        assert "back in the queue" in [event["message"] for event in events]
        steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
        assert steps == list(range(1, job["progress"]["total_steps"] + 1))
        assert job["attempt"] == 2
    finally:
        again.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_second_signal_ends_the_process_at_once(server: ServerProcess, second: signal.Signals) -> None:
    submit(server, name="codes", data=code_rows(16), training=JOB)
    wait_until(lambda: bool(processes(server, CHILD)))
    running = processes(server, CHILD)
    with ThreadPoolExecutor(5) as pool:
        streams = [
            # Sixteen answers each, of which two run at a time: none ends before the signals.
            pool.submit(server.client.post, "/generate", json={**LONG, "n": 16, "stream": True, "seed": seed})
            for seed in range(4)
        ]
        whole = pool.submit(server.client.post, "/generate", json={**LONG, "n": 16})
        # More sequences than four requests have: all were accepted. True until sixteen have ended.
        wait_until(lambda: num_sequences(server) > 4 * 16)
        server.terminate()
        wait_until(lambda: server.client.get("/ready").status_code == 503)
        server.process.send_signal(second)
        signalled = time.monotonic()
        assert server.exit_code() == 0
        assert time.monotonic() - signalled < HURRY_SECONDS
        texts = [(stream.result().status_code, stream.result().text) for stream in streams]
        assert all("event: error" in text if status == 200 else status == 503 for status, text in texts), texts
        assert whole.result().status_code == 503
        assert "shutting down" in whole.result().text
    wait_until(lambda: not any(process.is_running() for process in running), 10, "its children's end")


@pytest.mark.thorough
def test_second_signal_ends_a_hanging_process(tmp_path: Path, converted_tiny: Path) -> None:
    """A step never returns; the second signal ends the process long before the watchdog would."""
    server = Process(tmp_path, converted_tiny, least_seconds=600)
    try:
        server.wait_until(server.is_ready, "it was not ready in time")
        (tmp_path / HANG_NOW).touch()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.client.post, "/generate", json={**BODY, "seed": HANG})
            server.wait_until(lambda: server.num_requests() == 1, "it did not begin")
            time.sleep(1)
            server.process.terminate()
            server.wait_until(lambda: not server.is_ready(), "it drains")
            server.process.send_signal(signal.SIGINT)
            signalled = time.monotonic()
            assert server.process.wait(timeout=PATIENCE) == 1
            assert HURRY_SECONDS - 1 < time.monotonic() - signalled < HURRY_SECONDS + 10
            assert asked.exception() is not None
    finally:
        server.close()


@pytest.mark.parametrize("what", ["serve", "worker"])
def test_signal_during_startup(tmp_path: Path, tiny_base_dir: Path, what: str) -> None:
    """The process exits with a code of its own. A container's first process needs a handler, as SIGTERM does
    nothing otherwise."""
    if what == "serve":
        words = command(home=tmp_path, port=0, model=tiny_base_dir)
    else:
        words = [command()[0], "worker", "--home", str(tmp_path), "--model", str(tiny_base_dir)]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    if what == "serve":
        assert process.stderr.readline() == "smolora: loading libraries\n"
    else:
        wait_until(lambda: _handles(process.pid, signal.SIGTERM))
    process.terminate()
    assert process.wait(timeout=PATIENCE) in ((143,) if what == "serve" else (0, 143))
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def _handles(pid: int, number: signal.Signals) -> bool:
    """Return whether the process has a handler of its own for the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines() if os.path.exists(f"/proc/{pid}") else []
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)
