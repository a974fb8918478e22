"""A server and its worker on one GPU, over HTTP: an uploaded adapter, a trained adapter, and memory for both."""

import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import AdapterFiles
from tests.end_to_end.server_process import PATIENCE, ServerProcess
from tests.kits.gpu import NEEDS_GPU

pytestmark = [*NEEDS_GPU, pytest.mark.real]

PHRASES = [(f"HTTP {status.value} means", f" {status.phrase}.") for status in list(HTTPStatus)[:20]]


@pytest.fixture(scope="module")
def gpu_server(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Start a server as `smolora serve --device cuda` does, with a worker on the same GPU."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), model=base_dir, device="cuda", workers=1)
    yield server
    server.close()


def trained(server: ServerProcess, name: str, **training: object) -> dict[str, Any]:
    """Return the job of that name once it has ended."""
    body = {
        "name": name,
        "data": [{"prompt": prompt, "completion": completion} for prompt, completion in PHRASES],
        "validation": 0,
        "lora": {"rank": 16},
        "training": {"max_steps": 60, "batch_size": 8, "max_length": 64, "learning_rate": 2e-3, **training},
    }
    response = server.client.post("/train", json=body)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    deadline = time.monotonic() + 3 * PATIENCE
    while job["status"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
        job = server.client.get(f"/train/{job['id']}").json()
    return job


def test_uploaded_adapter_and_blend(gpu_server: ServerProcess, adapter_files: AdapterFiles) -> None:
    gpu_server.upload("left", adapter_files.make(1))
    gpu_server.upload("right", adapter_files.make(2, rank=16, alpha=32))
    base = gpu_server.text("HTTP 404 means", max_tokens=12)
    tuned = gpu_server.text("HTTP 404 means", adapter="left", max_tokens=12)
    blend = gpu_server.text("HTTP 404 means", adapter="left*0.5+right*0.5", max_tokens=12)
    assert len({base, tuned, blend}) == 3
    assert gpu_server.text("HTTP 404 means", adapter="left*0", max_tokens=12) == base


def test_gpu_trains_while_serving(gpu_server: ServerProcess) -> None:
    """While streams run, the job succeeds, its adapter knows the phrases, and its card names the GPU."""
    with gpu_server.stream("Tell me a story.", max_tokens=1500, ignore_eos=True) as events:
        next(events)
        job = trained(gpu_server, "phrases")
        assert job["status"] == "succeeded", job["error"]
        assert sum(1 for _ in events) > 0, "the stream went on to its end"
    answers = [gpu_server.text(prompt, adapter="phrases", max_tokens=12) for prompt, _ in PHRASES]
    assert sum(answer == phrase for answer, (_, phrase) in zip(answers, PHRASES, strict=True)) >= 16
    report = gpu_server.client.get(f"/train/{job['id']}/report").json()
    assert "NVIDIA" in report["environment"]["gpu"]
    assert report["environment"]["computed_by"][0].startswith("torch on")
    assert report["peak_memory_bytes"] > 100e6


def test_job_too_large_for_its_gpu_share_fails_once(base_dir: Path, tmp_path: Path) -> None:
    """A gigabyte for full fine-tuning is enough to load the base, but not for the fp32 master weights."""
    share = 1e9 / torch.cuda.mem_get_info()[1]
    flags: dict[str, Any] = {"model": base_dir, "device": "cuda", "workers": 1, "train_memory": share}
    server = ServerProcess(tmp_path / "home", kv_cache_bytes=64 << 20, adapter_cache_bytes=64 << 20, **flags)
    try:
        body = {
            "name": "all",
            "method": "full",
            "data": [{"text": f"{prompt}{completion}" * 40} for prompt, completion in PHRASES],
            "training": {"max_steps": 2},
        }
        job = server.client.post("/train", json=body).json()
        deadline = time.monotonic() + PATIENCE
        while (job := server.client.get(f"/train/{job['id']}").json())["status"] in ("queued", "running"):
            assert time.monotonic() < deadline, job
            time.sleep(0.2)
        assert job["status"] == "failed"
        assert "ran out of memory" in job["error"]
    finally:
        server.close()
