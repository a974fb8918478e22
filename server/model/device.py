"""Where the model runs and in which dtype, and whether this machine can do it."""

import logging
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from server.cgroups import usable_processors
from server.errors import StartupError
from server.model.gpu import Cuda

log = logging.getLogger("smolora.device")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "avx10_2", "bf16"})  # the last one is Arm's
_CPUINFO = Path("/proc/cpuinfo")


def use_threads(num_threads: int | None) -> None:
    """Compute with `num_threads` from here on, in torch and in native code that is created later.

    None: with torch's own number, which OMP_NUM_THREADS sets, but at most one for each processor that this process
    may use.
    """
    torch.set_num_threads(num_threads or min(torch.get_num_threads(), usable_processors()))


def choose_device(
    device: str,
    dtype: str,
    flags: frozenset[str] | None = None,
    cuda: Cuda | None = None,
    *,
    has_native: bool = False,
) -> tuple[torch.device, torch.dtype]:
    """Turn the settings `auto`, `cpu`, `cuda`, `cuda:N` and `auto`, `fp32`, `bf16`, `fp16` into torch's.

    `flags` are the CPU's, `cuda` what torch says of GPUs (None: this machine's), `has_native` whether native code
    computes on the CPU, which is in bf16 on any. Raises StartupError where the machine lacks what is asked for.
    """
    cuda = Cuda.of_this_machine() if cuda is None and device != "cpu" else cuda
    chosen = torch.device(device if device != "auto" else "cuda" if cuda and cuda.gpus else "cpu")
    if chosen.type == "cuda":
        assert cuda is not None
        gpu = cuda.check(device, chosen)
        # It may build a plan for each length of keys, of which a decode has a new one at every token.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if dtype == "auto":
            return chosen, torch.bfloat16 if gpu.has_bf16 else torch.float32
        return chosen, _DTYPES[dtype]
    if cuda is not None and cuda.trouble:
        log.warning("no GPU is used: %s", cuda.trouble)
    flags = cpu_flags() if flags is None else flags
    if platform.machine() in ("x86_64", "AMD64") and flags and "avx2" not in flags:
        raise StartupError("this CPU has no AVX2, which smolora needs (x86-64 since about 2015, or Arm)")
    if dtype == "auto":
        return chosen, torch.bfloat16 if has_native or flags & _BF16_FLAGS else torch.float32
    return chosen, _DTYPES[dtype]


def training_dtype(dtype: torch.dtype) -> torch.dtype:
    """What training computes in, where `dtype` serves: the same, but fp32 for fp16.

    Gradients vanish in fp16's range unless losses are scaled. Scaling takes a state that every checkpoint has to
    carry, and skips steps; fp32 needs neither, and is what `auto` means on cards without bf16.
    """
    return torch.float32 if dtype is torch.float16 else dtype


def multiplied_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which such weights are multiplied: fp32 on a CPU without products of bf16, at which torch is slow."""
    is_lacking = device.type == "cpu" and dtype is torch.bfloat16 and not cpu_flags() & _BF16_FLAGS
    return torch.float32 if is_lacking else dtype


def cpu_flags(text: str | None = None) -> frozenset[str]:
    """The first CPU's features as Linux names them; empty where it does not say. `text` stands in for its file."""
    if text is None:
        try:
            text = _CPUINFO.read_text()
        except OSError:
            return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; through pinned memory and without waiting where that is another memory."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def ints_beside(tensor: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    """The values in int64 on the tensor's device, by `to_device`."""
    return to_device(torch.tensor(values, dtype=torch.int64), tensor.device)


def floats_beside(tensor: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """The values in the tensor's dtype on its device, by `to_device`."""
    return to_device(torch.tensor(values, dtype=tensor.dtype), tensor.device)
