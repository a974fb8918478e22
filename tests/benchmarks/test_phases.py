"""The time of a native step by phase, measured briefly on a tiny base."""

import json
from pathlib import Path

import pytest

from benchmarks.serving.phases import Step, bytes_of, keeps_stored, limits, main, markdown, parameters
from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from server.model.native.abi import PHASES
from tests.kits.native import SHAPES, lend_native, native_library
from tests.kits.tiny import save_tiny_base
from tests.kits.tiny_gguf import save_tiny_gguf


def test_reduced_run(tmp_path: Path) -> None:
    native_library()
    architecture, options = SHAPES["grouped"]
    model = save_tiny_base(tmp_path / "tiny", architecture, {**options, "max_position_embeddings": 512})
    lend_native(tmp_path)
    found = main(["--quick", f"--model={model}", f"--home={tmp_path}", f"--out={tmp_path}", "--threads=1"])
    assert [each.step for each in found.found] == [Step(1, 1, 128), Step(2, 1, 128), Step(1, 32, 0)]
    for each in found.found:
        assert list(each.phases) == list(PHASES)
        assert 0 < sum(each.phases.values()) < 1.05 * each.whole
    assert found.bandwidth > 1e8
    assert found.speed > 1e8
    assert "|attention|" in markdown(found)
    assert json.loads((tmp_path / "phases.json").read_text())["made"]["quick"] is True
    few, many = (limits(found, Step(streams, 1, 100), "qkv") for streams in (1, 10))
    assert few is not None
    assert many is not None
    assert few[0] == many[0], "weights are read once"
    assert few[0] * found.bandwidth == pytest.approx(2 * found.sizes["qkv"]), "as they aren't stored in fewer bits"
    assert many[1] == pytest.approx(10 * few[1])
    assert limits(found, Step(1, 1, 100), "norm") is None


def test_quantized_weights_count_their_stored_bytes(tmp_path: Path) -> None:
    save_tiny_gguf(tmp_path / "tiny.gguf", {"": "Q4_1", "token_embd": "Q8_0"})
    base = load_base(resolve_base(str(tmp_path / "tiny.gguf"), tmp_path))
    sizes = parameters(base.config)
    found = bytes_of(base.weights)
    assert {phase: found[phase] / size for phase, size in sizes.items()} == {
        **dict.fromkeys(("qkv", "o", "gate_up", "down"), 20 / 32),
        "head": 34 / 32,
    }
    expanded = bytes_of(base.weights, are_stored=False)
    assert {phase: expanded[phase] / size for phase, size in sizes.items()} == dict.fromkeys(sizes, 2)
    assert [keeps_stored(*of) for of in (("avx512", 1), ("avx2", 2), ("avx2", 3), ("neon", 1))] == [
        *(True, False),
        *(True, False),
    ]
