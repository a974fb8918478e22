"""What CUDA is on this machine, whether a device can be used, and what to do where it can't.

Where the model runs and in which dtype, and whether this machine can do it.

Copies from the host's memory to a GPU's, beside what is computed there.
"""

import logging
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from server.errors import StartupError
from server.system.cgroups import usable_processors
from server.system.messages import plural

_DRIVER = Path("/proc/driver/nvidia/version")
_WITHOUT = "or set SMOLORA_DEVICE=cpu"


@dataclass(frozen=True)
class Gpu:
    """One device. `capability` is NVIDIA's (major, minor) version of what it can do."""

    name: str
    capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bf16 by itself."""
        return self.capability >= (8, 0)

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True)
class Cuda:
    """What torch says of CUDA here."""

    torch_version: str
    cuda_version: str | None  # that it was built for; None: without
    architectures: tuple[str, ...]  # that it has code for, such as sm_90; empty where it doesn't say
    gpus: tuple[Gpu, ...]
    trouble: str = ""  # why it finds none

    @classmethod
    def of_this_machine(cls) -> "Cuda":
        """Ask torch."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = tuple(gpu_of(torch.device("cuda", index)) for index in range(count))
        trouble = next((str(warning.message) for warning in said), "").split(". ")[0]
        return cls(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()), gpus, trouble)

    def check(self, setting: str, device: torch.device) -> Gpu:
        """The device, which SMOLORA_DEVICE=`setting` asks for. Raises StartupError where torch can't use it."""
        asked, index = f"SMOLORA_DEVICE={setting}", device.index or 0
        if index >= len(self.gpus):
            finds = f"{asked}: torch {self.torch_version} finds {plural(len(self.gpus), 'CUDA device')}"
            if self.gpus:
                raise StartupError(f"{finds}: choose one up to cuda:{len(self.gpus) - 1}")
            if self.cuda_version is None:
                raise StartupError(f"{finds}: it is a build without CUDA; install one with it, {_WITHOUT}")
            why = f" ({self.trouble})" if self.trouble else ""
            raise StartupError(
                f"{finds}{why}: see that nvidia-smi lists one here, with a driver for CUDA {self.cuda_version} (a "
                f"container must be given it, as compose's server-gpu is), {_WITHOUT}"
            )
        gpu = self.gpus[index]
        if self.architectures and not any(_runs(code, gpu.capability) for code in self.architectures):
            raise StartupError(
                f"{asked}: torch {self.torch_version} can't use {gpu}: it has code for "
                f"{', '.join(self.architectures)}; install a build for this GPU, {_WITHOUT}"
            )
        return gpu


def gpu_of(device: torch.device) -> Gpu:
    """What a CUDA device is."""
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def torch_on(device: torch.device) -> str:
    """What computes where native code doesn't: torch, with the GPU's name, since its kernels round as it does."""
    return "torch" if device.type == "cpu" else f"torch on {gpu_of(device).name}"


def driver_version(file: Path = _DRIVER) -> str | None:
    """The NVIDIA driver's; None where the system doesn't say."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text())
    except OSError:
        return None
    return found.group() if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on a GPU or not; torch says so in several ways."""
    words = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def limit_memory(device: torch.device, share: float) -> None:
    """Have torch run out of a GPU's memory at this share of it, in this process; without effect on a CPU."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device.index)  # which may be None: the current one


def empty_cache() -> None:
    """Give back what torch keeps of GPUs' memory for later tensors: what is free may lie in pieces."""
    torch.cuda.empty_cache()


@contextmanager
def room_for(what: str, device: torch.device) -> Iterator[None]:
    """StartupError where a GPU has no room for `what`, or doesn't work."""
    try:
        yield
    except RuntimeError as error:
        if device.type != "cuda":
            raise
        asked, line = f"SMOLORA_DEVICE={device}", str(error).splitlines()[0]
        if is_out_of_memory(error):
            raise StartupError(
                f"{asked}: the GPU has no room for {what}: nvidia-smi lists who else uses its memory; free some, "
                f"take a smaller SMOLORA_MODEL, {_WITHOUT}"
            ) from None
        if isinstance(error, torch.AcceleratorError):
            raise StartupError(f"{asked}: the GPU fails ({line}): see nvidia-smi, {_WITHOUT}") from None
        raise


def _runs(code: str, capability: tuple[int, int]) -> bool:
    """Whether code for `sm_86` (its major version, from the minor one on) or `compute_90` (from it on, compiled by
    the driver) runs on a device. What ends in `a` is for that capability alone."""
    kind, _, number = code.partition("_")
    made_for = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return made_for == capability
    if kind == "compute":
        return made_for <= capability
    return made_for[0] == capability[0] and made_for[1] <= capability[1]


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


class Uploads:
    """A stream of copies of its own on `device`; any thread may use it.

    What computes is on the device's default stream, and isn't told to read the places while they are written.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = cast("Callable[[torch.device], torch.cuda.Stream]", torch.cuda.Stream)(device)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy each pinned tensor to the place beside it, of its shape and dtype; returns once all are there."""
        with torch.cuda.stream(self._stream):
            there = [(source.to(self._device, non_blocking=True), place) for source, place in pairs]
            # Whoever had these places before may still be read by what was told earlier.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            for source, place in there:
                place.copy_(source)
            done = self._stream.record_event(_blocking_event())
        done.synchronize()


def _blocking_event() -> torch.cuda.Event:
    """One that lets whoever waits for it sleep."""
    return cast("Callable[..., torch.cuda.Event]", torch.cuda.Event)(blocking=True)
