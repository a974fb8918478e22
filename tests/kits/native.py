"""Native code for tests, compiled once into the cache, or a reason to skip; and bases to compare it on.

Every test that needs native code gets it here. With REQUIRE_NATIVE=1, tests fail where they would be skipped.
"""

import ctypes
import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from server.model.base.source import resolve_base
from server.model.base.weights import LAYER_TENSORS, BaseModel, BaseWeights, LayerWeights, load_base
from server.model.native.build import NativeUnavailable, library_name
from server.model.native.library import instructions, load_library
from server.model.native.model import NativeModel
from server.model.ops.linear import can_pack
from tests.kits.cache import CACHE
from tests.kits.tiny import save_tiny_base

SHAPES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "one group": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}),
    "grouped": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 96}),
    "eight to one": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64}),
    "wide heads": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}),
    "untied": (
        "llama",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": False},
    ),
    "no rotary in a layer": (
        "smollm3",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "no_rope_layers": [1, 0, 1]},
    ),
}
"""Architectures and options of tiny bases that the native code covers."""


def is_required() -> bool:
    """Return whether REQUIRE_NATIVE=1 says that this machine can run native code."""
    return os.environ.get("REQUIRE_NATIVE") == "1"


def give_up(reason: object) -> NoReturn:
    """Skip the test, or fail it if native code is required."""
    if is_required():
        pytest.fail(f"REQUIRE_NATIVE=1, but {reason}")
    pytest.skip(f"nothing native here: {reason}")


def native_library() -> ctypes.CDLL:
    """The native library; the test is skipped if this machine can't have one."""
    try:
        return _cached_library()
    except NativeUnavailable as reason:
        give_up(reason)


def hold_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit this process to the named instruction set; skip the test if the processor doesn't have it."""
    monkeypatch.setenv("NATIVE_INSTRUCTIONS", name)
    try:
        instructions()
    except NativeUnavailable as reason:
        give_up(reason)
    native_library()


def needs_packed_products() -> None:
    """Skip the test if torch has no product of packed 16-bit weights."""
    if not can_pack(torch.zeros(1, 1, dtype=torch.bfloat16)):
        give_up("this processor or build of torch can't pack weights")


def has_native() -> bool:
    """Return whether native code runs on this machine. Raise NativeUnavailable if it doesn't but is required."""
    try:
        _cached_library()
    except NativeUnavailable:
        if is_required():
            raise
        return False
    return True


def _cached_library() -> ctypes.CDLL:
    """Return the library, which one process compiles for all. Raise NativeUnavailable if that is impossible."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "native.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return load_library(CACHE / "native")


def lend_native(home: Path) -> None:
    """Copy the compiled library, if there is one, to a server's HOME, so that it needn't compile it again."""
    if not has_native():
        return
    (home / "native").mkdir(mode=0o755, exist_ok=True)  # not writable by others, independent of the umask
    if not (home / "native" / library_name(instructions())).exists():
        shutil.copy2(CACHE / "native" / library_name(instructions()), home / "native")


def tiny_of(directory: Path, shape: str, **options: object) -> BaseModel:
    """Save a tiny base of one of SHAPES to the directory, and load it in bf16. It can learn."""
    architecture, given = SHAPES[shape]
    changed = {**given, "initializer_range": 0.06, **options}
    saved = save_tiny_base(directory / "tiny", architecture, changed, seed=3)
    base = load_base(resolve_base(str(saved), directory), torch.bfloat16)
    assert (base.weights.lm_head is not base.weights.embed) == (shape == "untied")
    return base


def native_model(base: BaseModel, max_positions: int = 512, num_threads: int = 1) -> NativeModel:
    """Return a native model with one thread by default.

    Several threads give the same bits, but wait for each other by spinning while other tests use the cores.
    """
    assert base.dtype is torch.bfloat16
    return NativeModel(
        native_library(), base.config, base.weights, max_positions=max_positions, num_threads=num_threads
    )


def widened(weights: BaseWeights) -> BaseWeights:
    """Return the same values in fp32; a tied head stays tied."""
    embed = weights.embed.float()
    layers = (LayerWeights(*(getattr(layer, name).float() for name in LAYER_TENSORS)) for layer in weights.layers)
    lm_head = embed if weights.lm_head is weights.embed else weights.lm_head.float()
    return BaseWeights(embed, tuple(layers), weights.final_norm.float(), lm_head)
