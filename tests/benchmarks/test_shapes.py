"""Larger bases: their random weights, their report, and one reduced run."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import random_base
from benchmarks.shapes.__main__ import main
from benchmarks.shapes.random_base import CONTEXT, SHAPES, SIGMA, Shape, write_random_base
from benchmarks.shapes.report import markdown
from server.model.base.gguf import open_gguf
from tests.benchmarks.kit import shapes

TINY = Shape(hidden=128, inner=256, layers=2, heads=2, kv_heads=1, rope_theta=10_000.0)


def test_random_weights_are_stored_like_the_embedded_base(tmp_path: Path) -> None:
    base = open_gguf(write_random_base(tmp_path / "tiny.gguf", TINY))
    config = base.config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in sizes] == [128, 256, 2, 2, 1]
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    assert (config["max_position_embeddings"], rope["rope_theta"]) == (CONTEXT, 10_000.0)
    assert config["tie_word_embeddings"]
    kinds = {name: stored.type for name, stored in base.quantized.items()}
    assert kinds.pop("model.embed_tokens.weight") == "Q8_0"
    assert (len(kinds), set(kinds.values())) == (7 * TINY.layers, {"Q4_1"})
    for name, stored in base.tensors.items():
        values = stored.read().float()
        if "norm" in name:
            assert torch.equal(values, torch.ones(128))
        else:
            assert values.std().item() == pytest.approx(SIGMA, rel=0.02), name
            assert abs(values.mean().item()) < SIGMA / 20, name


def test_sizes_match_their_names() -> None:
    vocab = 49_152
    counts = {
        name: vocab * shape.hidden
        + shape.layers * sum(outputs * inputs for _, outputs, inputs in shape.matrices())
        for name, shape in SHAPES.items()
    }
    assert counts == {"360M": pytest.approx(360e6, rel=0.01), "1.7B": pytest.approx(1.7e9, rel=0.01)}


def test_report() -> None:
    text = markdown(shapes())
    assert "### 9B" in text
    assert "|1 stream, base|35.0 (30.0–40.0)|20.0|can't|" in text
    assert "|1 stream, 1 adapter|31.5 (27.0–36.0)|can't|can't|" in text
    assert "A quick run" in markdown(shapes(quick=True))


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shapes", "360M,9B"])
    assert "--shapes: no 9B among 360M, 1.7B" in capsys.readouterr().err


@pytest.mark.slow
def test_reduced_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(random_base.SHAPES, "tiny", TINY)
    out = tmp_path / "out"
    found = main(["--quick", "--shapes", "tiny", "--peers", "none", "--threads", "1", "--out", str(out)])
    rows = found.sizes["tiny"].rows
    assert [row.load.key for row in rows] == ["1-base", "2-distinct"]
    assert all(speed > 0 for row in rows for speed in row.speed())
    assert json.loads((out / "shapes.json").read_text())["sizes"]["tiny"]["made"]["quick"] is True
    assert sorted(path.name for path in out.iterdir()) == ["serve.log", "shapes.json"]
