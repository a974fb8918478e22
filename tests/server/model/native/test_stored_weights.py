"""Steps over weights stored in 4 and 8 bits, and over expanded weights: the same bits."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.native.build import NativeUnavailable
from server.model.native.model import NativeModel
from tests.kits.native import native_library
from tests.kits.tiny_gguf import save_tiny_gguf
from tests.server.model.native.test_native_forward import LENGTHS, MAX_POSITIONS, Pair, native_logits, sequences_of


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return native_library()


def expanded(base: BaseModel) -> BaseModel:
    return replace(base, weights=replace(base.weights, quantized={}))


def check_same_bits(base: BaseModel, library: ctypes.CDLL, strength: float) -> None:
    """Compare long prompts in pieces, then single tokens, with adapters and blends too."""
    assert base.weights.quantized
    ours, theirs = (Pair.of(one, library, strength) for one in (base, expanded(base)))
    sequences = sequences_of(LENGTHS, base.config.vocab_size, seed=3)
    cuts = [[length - 2, length - 1, length] if length > 3 else [length] for length in LENGTHS]
    for with_adapters in (False, True):
        found = native_logits(ours, sequences, with_adapters, cuts=cuts)
        assert torch.equal(found, native_logits(theirs, sequences, with_adapters, cuts=cuts))
        assert found.isfinite().all()


@pytest.mark.parametrize("types", [{"token_embd": "Q8_0", "": "Q4_1"}, {"attn_output": "Q4_1", "": "Q8_0"}])
def test_a_tiny_base(tmp_path: Path, library: ctypes.CDLL, types: dict[str, str]) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", types)
    base = load_base(resolve_base(str(tmp_path / "tiny.gguf"), tmp_path))
    check_same_bits(base, library, strength=0.3)


@pytest.mark.real
@pytest.mark.thorough  # tiny bases are tested above
def test_the_real_base(base_dir: Path, library: ctypes.CDLL) -> None:
    base = load_base(base_dir)
    if not base.weights.quantized:
        pytest.skip("SMOLORA_TEST_BASE is not stored in blocks")
    assert len(base.weights.quantized) == 1 + 4 * base.config.num_layers
    check_same_bits(base, library, strength=0.05)


def test_blocks_of_another_shape_are_refused(tmp_path: Path, library: ctypes.CDLL) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf")
    base = load_base(resolve_base(str(tmp_path / "tiny.gguf"), tmp_path))
    short = replace(base.weights.quantized["embed"], blocks=base.weights.quantized["embed"].blocks[:-32])
    weights = replace(base.weights, quantized={**base.weights.quantized, "embed": short})
    with pytest.raises(NativeUnavailable, match="embed has blocks of another shape than its weights"):
        NativeModel(library, base.config, weights, max_positions=MAX_POSITIONS, num_threads=1)
