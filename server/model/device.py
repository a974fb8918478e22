"""Chooses the device and the dtype that a base runs in, explains why a GPU can't be used, and copies to GPUs."""

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
    """One GPU. `capability` is NVIDIA's compute capability (major, minor)."""

    name: str
    capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        """Whether the GPU has bf16 arithmetic."""
        return self.capability >= (8, 0)

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True)
class Cuda:
    """CUDA on this machine, as torch reports it."""

    torch_version: str
    cuda_version: str | None  # the version that torch was built for; None: a build without CUDA
    architectures: tuple[str, ...]  # GPU architectures that torch has code for, such as sm_90; empty if unknown
    gpus: tuple[Gpu, ...]
    trouble: str = ""  # why torch finds no GPU

    @classmethod
    def of_this_machine(cls) -> "Cuda":
        """Ask torch which GPUs there are. torch's warnings are kept in the field `trouble`."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = tuple(gpu_of(torch.device("cuda", index)) for index in range(count))
        trouble = next((str(warning.message) for warning in said), "").split(". ")[0]
        return cls(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()), gpus, trouble)

    def check(self, setting: str, device: torch.device) -> Gpu:
        """Return the GPU of the device that SMOLORA_DEVICE=`setting` names.

        Raise StartupError if torch can't use it.
        """
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
    """Return a CUDA device's name and capability."""
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def torch_on(device: torch.device) -> str:
    """Return "torch", with the GPU's name if the device is a GPU, to say what computes.

    The GPU's name matters, since results are rounded differently on different GPUs.
    """
    return "torch" if device.type == "cpu" else f"torch on {gpu_of(device).name}"


def driver_version(file: Path = _DRIVER) -> str | None:
    """Return the NVIDIA driver's version, or None if the system doesn't report it."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text())
    except OSError:
        return None
    return found.group() if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on a GPU or the CPU. torch has several such errors."""
    words = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def limit_memory(device: torch.device, share: float) -> None:
    """Limit this process to a share of a GPU's memory. Do nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device.index)  # index None: the current GPU


def empty_cache() -> None:
    """Free the GPU memory that torch keeps for later tensors, since that memory may be fragmented."""
    torch.cuda.empty_cache()


@contextmanager
def room_for(what: str, device: torch.device) -> Iterator[None]:
    """Raise StartupError if the block fails because a GPU has no room for `what` or doesn't work."""
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
    """Return whether code for an architecture runs on a device with this compute capability.

    `sm_86` runs on capability 8.6 and on later minor versions of 8. `compute_90` runs on 9.0 and on all later
    versions, since the driver compiles it. A name that ends in `a` runs on exactly that capability.
    """
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
    """Set the number of threads of torch, and of native code that is created later.

    If `num_threads` is None, use torch's own number, which OMP_NUM_THREADS sets, but at most one thread for each
    processor that this process may use.
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
    """Return torch's device and dtype for the settings `device` and `dtype`.

    `device` is `auto`, `cpu`, `cuda` or `cuda:N`, and `dtype` is `auto`, `fp32`, `bf16` or `fp16`. `flags` are the
    CPU's features and `cuda` the GPUs (None: this machine's). `has_native` means that native code computes on the
    CPU; it uses bf16 on every processor. Raise StartupError if the machine lacks what the settings ask for.
    """
    cuda = Cuda.of_this_machine() if cuda is None and device != "cpu" else cuda
    chosen = torch.device(device if device != "auto" else "cuda" if cuda and cuda.gpus else "cpu")
    if chosen.type == "cuda":
        assert cuda is not None
        gpu = cuda.check(device, chosen)
        # cuDNN may build a plan for each number of keys, which is new for every decoded token.
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
    """Return the dtype to train in if serving uses `dtype`: the same, except fp32 instead of fp16.

    Gradients underflow in fp16 unless losses are scaled. Scaling needs a state in every checkpoint, and skips
    steps. fp32 needs no scaling, and `auto` chooses it for GPUs without bf16.
    """
    return torch.float32 if dtype is torch.float16 else dtype


def multiplied_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which to multiply weights of `dtype`.

    This is `dtype`, except fp32 for bf16 on a CPU without bf16 products, since torch emulates these slowly.
    """
    is_lacking = device.type == "cpu" and dtype is torch.bfloat16 and not cpu_flags() & _BF16_FLAGS
    return torch.float32 if is_lacking else dtype


def cpu_flags(text: str | None = None) -> frozenset[str]:
    """Return the first CPU's features by Linux's names; empty if unknown. `text` replaces /proc/cpuinfo."""
    if text is None:
        try:
            text = _CPUINFO.read_text()
        except OSError:
            return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device. Copies to a GPU go through pinned memory and don't block."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def ints_on(tensor: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    """Return the values as int64 on the tensor's device."""
    return to_device(torch.tensor(values, dtype=torch.int64), tensor.device)


def floats_on(tensor: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """Return the values in the tensor's dtype and on the tensor's device."""
    return to_device(torch.tensor(values, dtype=tensor.dtype), tensor.device)


class Uploads:
    """A CUDA stream for copies to `device`, so that they run while the default stream computes. Thread-safe.

    The default stream must not read a destination while a copy writes to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = cast("Callable[[torch.device], torch.cuda.Stream]", torch.cuda.Stream)(device)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy each pair's first tensor, which is pinned, into its second, and wait until the copies are done.

        The two tensors must have the same shape and dtype.
        """
        with torch.cuda.stream(self._stream):
            there = [(source.to(self._device, non_blocking=True), place) for source, place in pairs]
            # Kernels that were launched earlier may still read the previous content of these places.
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            for source, place in there:
                place.copy_(source)
            done = self._stream.record_event(_blocking_event())
        done.synchronize()


def _blocking_event() -> torch.cuda.Event:
    """Return a CUDA event. A thread that waits for this event sleeps instead of spinning."""
    return cast("Callable[..., torch.cuda.Event]", torch.cuda.Event)(blocking=True)
