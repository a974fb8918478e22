"""The CUDA of this machine, and the errors if it can't be used."""

import errno
from pathlib import Path

import pytest
import torch

from server.errors import StartupError
from server.model.base.weights import BaseModel, load_base
from server.model.device import Cuda, Gpu, choose_device, driver_version, is_out_of_memory, room_for
from tests.kits.fake_gpu.card import Card
from tests.kits.fake_gpu.cuda import fake_cuda

CUDA = torch.device("cuda")
H100, A10, T4, P100 = (
    Gpu(name, capability)
    for name, capability in [("H100", (9, 0)), ("A10", (8, 6)), ("Tesla T4", (7, 5)), ("Tesla P100", (6, 0))]
)
CODE = ("sm_75", "sm_80", "sm_86", "sm_90", "compute_90")


def cuda(*gpus: Gpu, trouble: str = "", code: tuple[str, ...] = CODE) -> Cuda:
    return Cuda("2.13.0", "13.0", code, gpus, trouble)


@pytest.mark.parametrize(
    ("capabilities", "device", "expected"),
    [
        (((9, 0),), "cuda", torch.bfloat16),
        (((7, 5),), "auto", torch.float32),
        (((9, 0), (7, 5)), "cuda:1", torch.float32),
        (((7, 5), (8, 6)), "cuda:1", torch.bfloat16),
    ],
)
def test_bf16_if_the_device_supports_it(
    capabilities: tuple[tuple[int, int], ...], device: str, expected: torch.dtype
) -> None:
    with fake_cuda(Card(capabilities=capabilities)):
        chosen, dtype = choose_device(device, "auto")
    assert (chosen.type, dtype) == ("cuda", expected)


def test_attention_is_not_cudnns() -> None:
    """cuDNN may build a plan, in tens of ms, for each length of keys: for a single sequence, at every token."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    choose_device("cpu", "auto")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with fake_cuda():
        choose_device("cuda", "auto")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_is_too_old_is_one_line(device: str) -> None:
    with (
        fake_cuda(Card(name="Tesla P100", capabilities=((6, 0),))),
        pytest.raises(StartupError, match=r"^SMOLORA_DEVICE=.*Tesla P100, compute capability 6\.0.*DEVICE=cpu$"),
    ):
        choose_device(device, "auto")


@pytest.mark.parametrize(
    ("gpu", "code", "runs"),
    [
        (A10, ("sm_80",), True),  # same major version, and older
        (A10, ("sm_90",), False),
        (A10, ("sm_75", "sm_90", "compute_90"), False),
        (H100, ("sm_80", "sm_86"), False),
        (H100, ("sm_80", "compute_80"), True),  # compiled by the driver
        (H100, ("sm_90a",), True),
        (Gpu("B300", (10, 3)), ("sm_100", "sm_120"), True),
        (Gpu("B300", (10, 3)), ("sm_100a", "sm_120"), False),
        (Gpu("RTX 5090", (12, 0)), ("sm_100f", "sm_120"), True),
        (P100, CODE, False),
        (P100, (), True),  # nothing is known of the build
    ],
)
def test_which_gpus_a_build_of_torch_runs_on(gpu: Gpu, code: tuple[str, ...], runs: bool) -> None:
    found = cuda(gpu, code=code)
    if runs:
        assert found.check("cuda", CUDA) == gpu
    else:
        with pytest.raises(StartupError, match=f"can't use {gpu.name}.*{code[0]}.*SMOLORA_DEVICE=cpu"):
            found.check("cuda", CUDA)


@pytest.mark.parametrize(
    ("found", "device", "says"),
    [
        (Cuda("2.13.0+cpu", None, (), ()), "cuda", "finds 0 CUDA devices: it is a build without CUDA"),
        (cuda(), "cuda", "finds 0 CUDA devices: see that nvidia-smi lists one here, with a driver for CUDA 13.0"),
        (
            cuda(trouble="The NVIDIA driver is too old"),
            "cuda",
            r"\(The NVIDIA driver is too old\): see that nvidia",
        ),
        (cuda(H100, T4), "cuda:2", "finds 2 CUDA devices: choose one up to cuda:1$"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(found: Cuda, device: str, says: str) -> None:
    with pytest.raises(StartupError, match=f"^SMOLORA_DEVICE={device}: .*{says}") as caught:
        choose_device(device, "auto", cuda=found)
    assert "\n" not in str(caught.value)


def test_auto_falls_back_and_logs_why(caplog: pytest.LogCaptureFixture) -> None:
    device, _ = choose_device("auto", "auto", cuda=cuda(trouble="The NVIDIA driver is too old"))
    assert device.type == "cpu"
    assert "driver is too old" in caplog.text


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "no room for the base"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might…"), "no room for the base"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling…"), "no room for the base"),
        (torch.AcceleratorError("CUDA error: devices are busy\nmore"), r"fails \(CUDA error: devices are busy\)"),
    ],
)
def test_a_gpu_that_is_full_or_out_of_order_is_one_line(error: RuntimeError, says: str) -> None:
    with (
        pytest.raises(StartupError, match=f"^SMOLORA_DEVICE=cuda: .*{says}.*DEVICE=cpu$"),
        room_for("the base", CUDA),
    ):
        raise error


def test_a_base_on_a_full_gpu_is_one_line(tiny_base: BaseModel) -> None:
    with fake_cuda(Card(is_full=True)), pytest.raises(StartupError, match="no room for the base"):
        load_base(tiny_base.directory, torch.bfloat16, "cuda")


def test_other_errors_are_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes"), room_for("the base", CUDA):
        raise RuntimeError("shapes don't fit")
    with pytest.raises(torch.OutOfMemoryError), room_for("the base", torch.device("cpu")):
        raise torch.OutOfMemoryError
    assert not is_out_of_memory(RuntimeError("shapes don't fit"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(MemoryError("no room for 5 bytes"))  # of a pool in huge pages
    assert is_out_of_memory(RuntimeError("unable to mmap 5 bytes from file <a>: Cannot allocate memory (12)"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.223.02  Sat Oct  7 15:39:11 UTC 2023\n",
            "470.223.02",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("nothing of the kind", None),
    ],
)
def test_the_drivers_version(text: str, version: str | None, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "absent") is None
