"""The speed that a job's estimate goes by: of an earlier one on a device like this, else a product's."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from server.api.estimate import Estimator
from server.database import connect
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.training.spec import JobSpec
from tests.kits.fake_gpu.card import Card
from tests.kits.fake_gpu.cuda import fake_cuda

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
L4 = {"device": "cuda:0", "gpu": "NVIDIA L4, compute capability 8.9"}


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(connect(tmp_path))


def has_trained(
    jobs: Jobs, tokens_per_second: float, environment: Mapping[str, object], **card: Mapping[str, object]
) -> None:
    """A job has succeeded at that speed, the newest of all; `card` is what else its card says."""
    leases, number = Leases(jobs._engine), len(jobs.list())
    jobs.submit(JobSpec(f"a{number}"), job_id=f"job-{number}", data={})
    claim = leases.claim("worker")
    assert claim is not None
    report = {"environment": environment, **card}
    leases.succeed(claim, progress={"tokens_per_second": tokens_per_second}, metrics={}, report=report)


def speed(jobs: Jobs, device: torch.device) -> tuple[float, str]:
    return Estimator(jobs, 1_000_000, torch.float32, device)._speed("lora")


def test_devices_are_not_mixed(jobs: Jobs) -> None:
    has_trained(jobs, 100.0, {"device": "cpu", "gpu": None})
    has_trained(jobs, 9000.0, L4)
    assert speed(jobs, CPU) == (100.0, "an earlier job")
    with fake_cuda(Card(name="NVIDIA L4", capabilities=((8, 9),))):
        assert speed(jobs, CUDA) == (9000.0, "an earlier job")
    with fake_cuda(Card(name="NVIDIA H100")):
        assert speed(jobs, CUDA)[1] == "a matrix product"


def test_older_cards_name_no_gpu(jobs: Jobs) -> None:
    has_trained(jobs, 100.0, {"device": "cpu"})
    has_trained(jobs, 9000.0, {"device": "cuda"})
    assert speed(jobs, CPU) == (100.0, "an earlier job")
    with fake_cuda():
        assert speed(jobs, CUDA)[1] == "a matrix product"


@pytest.mark.parametrize(("flags", "measured"), [({"avx2"}, torch.float32), ({"amx_bf16"}, torch.bfloat16)])
def test_a_product_is_one_that_training_makes(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, flags: set[str], measured: torch.dtype
) -> None:
    """In bf16 torch takes thirty times as long where the processor has no products of it; native code does not."""
    monkeypatch.setattr("server.model.device.cpu_flags", lambda: frozenset(flags))
    made: list[torch.dtype] = []

    def ones(*_: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(dtype)
        return torch.zeros(2, 2, device=device)

    monkeypatch.setattr(torch, "ones", ones)
    assert Estimator(jobs, 1_000_000, torch.bfloat16, CPU)._speed("lora")[1] == "a matrix product"
    assert set(made) == {measured}


def test_bases_are_not_mixed(jobs: Jobs) -> None:
    """A server that serves a large base may have trained on a small one before."""
    small, large = {"parameters": 1_000_000}, {"parameters": 3_000_000_000}
    has_trained(jobs, 9000.0, {"device": "cpu"}, base_model=small)
    has_trained(jobs, 3.0, {"device": "cpu"}, base_model=large)
    assert speed(jobs, CPU) == (9000.0, "an earlier job")
    assert Estimator(jobs, 3_000_000_000, torch.float32, CPU)._speed("lora") == (3.0, "an earlier job")
    assert Estimator(jobs, 360_000_000, torch.float32, CPU)._speed("lora")[1] == "a matrix product"
