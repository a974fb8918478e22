"""The choice of device and dtype."""

import platform
from collections.abc import Iterator

import pytest
import torch

from server.errors import StartupError
from server.model import device
from server.model.device import choose_device, cpu_flags, training_dtype, use_threads

PLAIN = frozenset({"avx2", "fma"})
HAS_CUDA = torch.cuda.is_available()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (PLAIN, torch.float32),
        (PLAIN | {"avx512_bf16"}, torch.bfloat16),
        (PLAIN | {"amx_bf16"}, torch.bfloat16),
        (frozenset(), torch.float32),  # nothing is known of it
    ],
)
def test_bf16_only_if_the_cpu_supports_it(flags: frozenset[str], expected: torch.dtype) -> None:
    assert choose_device("cpu", "auto", flags) == (torch.device("cpu"), expected)


def test_native_code_computes_in_bf16_on_any_cpu() -> None:
    assert choose_device("cpu", "auto", PLAIN, has_native=True)[1] == torch.bfloat16
    assert choose_device("cpu", "fp32", PLAIN, has_native=True)[1] == torch.float32


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_named_dtype_is_taken(name: str, dtype: torch.dtype) -> None:
    assert choose_device("cpu", name, PLAIN)[1] == dtype


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86's")
def test_no_avx2_is_one_line() -> None:
    with pytest.raises(StartupError, match="no AVX2"):
        choose_device("cpu", "auto", frozenset({"sse2"}))


@pytest.mark.skipif(HAS_CUDA, reason="there is one")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_one_line(device: str) -> None:
    with pytest.raises(
        StartupError, match=rf"^SMOLORA_DEVICE={device}: torch .* finds 0 CUDA devices: .* SMOLORA_DEVICE=cpu$"
    ):
        choose_device(device, "auto")


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_auto_is_the_gpu_if_there_is_one() -> None:
    device, dtype = choose_device("auto", "auto")
    assert device.type == "cuda"
    assert dtype in (torch.bfloat16, torch.float32)


def test_flags_are_read_as_linux_lists_them() -> None:
    intel = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    assert cpu_flags(intel) == {"fpu", "avx2", "avx512_bf16"}
    assert cpu_flags("processor : 0\nFeatures\t: fp asimd bf16\n") == {"fp", "asimd", "bf16"}
    assert cpu_flags("nothing of the kind") == frozenset()


def test_nothing_is_trained_in_fp16() -> None:
    assert training_dtype(torch.float16) is torch.float32
    assert training_dtype(torch.bfloat16) is torch.bfloat16
    assert training_dtype(torch.float32) is torch.float32


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_threads_are_at_most_the_usable_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable_processors", lambda: 3)
    torch.set_num_threads(8)
    use_threads(None)
    assert torch.get_num_threads() == 3, "a quota of 3 processors on a larger machine"
    torch.set_num_threads(2)
    use_threads(None)
    assert torch.get_num_threads() == 2, "as OMP_NUM_THREADS has it"
    use_threads(5)
    assert torch.get_num_threads() == 5, "the setting wins"
