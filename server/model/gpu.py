"""What CUDA is on this machine, whether a device can be used, and what to do where it can't."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from server.counted import counted
from server.errors import StartupError

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
            finds = f"{asked}: torch {self.torch_version} finds {counted(len(self.gpus), 'CUDA device')}"
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
