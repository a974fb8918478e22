"""Loads a base for serving or training, on the device and in the dtype that the settings ask for."""

from collections.abc import Callable
from pathlib import Path

import torch

from server.config import WorkerSettings
from server.model.base.weights import BaseModel, load_base
from server.model.device import choose_device, limit_memory, room_for, training_dtype, use_threads
from server.model.native.library import why_unavailable
from server.storage.home import Home


def load_on_device(
    settings: WorkerSettings,
    directory: Path,
    say: Callable[[str], None],
    memory_share: Callable[[int], float | None],
    *,
    trains: bool = False,
) -> BaseModel:
    """Load a converted base to the device that the settings name, and set the number of threads that compute.

    `memory_share` takes the bytes of a GPU's memory, and returns the share that this process may use, or None for
    no limit. Raise StartupError if the machine lacks what the settings ask for.
    """
    use_threads(settings.threads)
    device, dtype, reason = _choose(settings)
    if reason and device.type == "cpu" and settings.dtype == "auto" and dtype is not torch.bfloat16:
        say(f"no native code: {reason}; torch computes instead, more slowly")  # load_native says so in bf16
    if trains and training_dtype(dtype) is not dtype:
        dtype = training_dtype(dtype)
        say("computes in fp32 instead of SMOLORA_DTYPE=fp16, in which gradients would vanish")
    if device.type == "cuda":
        with room_for("another process", device):
            share = memory_share(torch.cuda.mem_get_info(device)[1])
            if share is not None:
                limit_memory(device, share)
    say(f"loading {settings.model} on {device} in {str(dtype).removeprefix('torch.')}")
    return load_base(directory, dtype, device)


def serves_natively(settings: WorkerSettings) -> bool:
    """Return whether a server with these settings computes with native code."""
    if settings.device not in ("auto", "cpu"):
        return False
    device, dtype, reason = _choose(settings)
    return reason is None and device.type == "cpu" and dtype is torch.bfloat16


def _choose(settings: WorkerSettings) -> tuple[torch.device, torch.dtype, str | None]:
    """Return the device and the dtype for serving, and why there is no native code.

    The reason is None if there is native code, and empty if the settings turn native code off.
    """
    reason = why_unavailable(Home(settings.home).native) if settings.native else ""
    return *choose_device(settings.device, settings.dtype, has_native=reason is None), reason
