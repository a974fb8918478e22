"""The card as JSON: every number in its place, nothing that JSON can't say, bounded."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.lora import LoraConfig
from server.model.base.weights import BaseModel
from server.training.evaluate import Evaluation, Scores
from server.training.report import (
    MAX_POINTS,
    AdapterFacts,
    Environment,
    Gate,
    build_report,
    decide,
    peak_memory_bytes,
)
from server.training.spec import JobSpec
from server.training.verdicts import Comparison
from tests.kits.fake_gpu.card import Card
from tests.kits.fake_gpu.cuda import fake_cuda, on_card
from tests.server.training.reports.report_kit import FOUND, SPEC, UNMEASURED

CPU = torch.device("cpu")
COSTS = ("steps", "kept_step", "epochs", "tokens", "tokens_per_second", "wall_seconds")


def test_the_card(tiny_base: BaseModel) -> None:
    report = json.loads(json.dumps(build_report(SPEC, tiny_base, FOUND), allow_nan=False))
    num_base = sum(tensor.numel() for _, tensor in tiny_base.weights.tensors())
    assert report["name"] == "tweets"
    assert report["method"] == "lora"
    assert report["base_model"] == {"name": "tiny-llama", "digest": tiny_base.digest, "parameters": num_base}
    assert report["adapter"] == {
        "digest": "12" * 32,
        "rank": 8,
        "alpha": 16.0,
        "use_rslora": False,
        "target_modules": ["q_proj", "v_proj"],
        "parameters": 5000,
    }
    assert report["trainable_parameters"] == 5000
    assert report["trainable_share"] == 5000 / num_base
    assert report["evaluation"]["num_rows"] == 6
    assert report["evaluation"]["num_tokens"] == 120
    assert report["evaluation"]["base"]["loss"] == 2.5
    assert report["evaluation"]["base"]["perplexity"] == pytest.approx(12.182494)
    assert report["evaluation"]["tuned"]["accuracy"] == 0.875
    assert report["evaluation"]["tuned"]["exact_match"] == 0.5
    assert report["evaluation"]["latest"]["loss"] == 0.75
    assert report["evaluation"]["num_completions"] == 4
    right = {"base": 0, "tuned": 8, "latest": 0, "parent": None}
    assert report["recall"] == {"num_rows": 8, "num_right": right}
    assert report["comparisons"]["base"]["version"] is None
    assert report["comparisons"]["latest"] == {
        "version": "tweets@2",
        "metric": "exact_match",
        "num_rows": 12,
        "includes_trained": True,
        "tuned": 10 / 12,
        "other": 1 / 12,
        "standard_error": 0.1,
        "difference": 9 / 12,
        "low": 0.4,
        "high": 0.95,
        "verdict": "better",
        "summary": "better than tweets@2: 10 of 12 rows, trained ones included, exactly right, against 1 "
        "(difference +0.7500, 95 % interval +0.4000 to +0.9500)",
    }
    assert report["comparisons"]["parent"] is None
    assert report["gate"]["publish_if"] == "improves_latest"
    assert report["gate"]["passes"] is True
    assert report["gate"]["reason"]
    cost = {name: report[name] for name in COSTS}
    assert cost == {
        "steps": 21,
        "kept_step": 21,
        "epochs": 3.0,
        "tokens": 3600,
        "tokens_per_second": 412.5,
        "wall_seconds": 31.25,
    }
    assert (report["peak_memory_bytes"], report["bytes_stored"]) == (1_500_000_000, 1_234_567)
    assert report["data"] == {
        "digest": "ab" * 32,
        "rows": 54,
        "tokens": 1200,
        "trained_tokens": 300,
        "truncated": 2,
        "validation_digest": "ef" * 32,
        "validation_rows": 6,
        "validation_truncated": 1,
        "overlap": 3,
        "test_digest": None,
        "test_rows": 0,
        "test_overlap": 0,
        "split": 0,
        "dropped": 0,
        "lost_tokens": 0,
    }
    assert report["lineage"] == {"start_from": "tweets@2", "digest": "cd" * 32}
    assert JobSpec.from_document(report["config"]) == SPEC
    assert report["environment"]["threads"] == 2
    assert report["environment"]["dtype"] == "bf16"
    assert report["curves"]["eval_loss"] == [[10, 0.75], [21, 0.5]]
    assert report["curves"]["train_loss"][0] == [1, 3.0]
    assert len(report["curves"]["train_loss"]) == 21


def test_full_fine_tuning_from_the_base_without_held_out_rows(tiny_base: BaseModel) -> None:
    spec = JobSpec(name="all", method="full")
    found = replace(UNMEASURED, adapter=None, num_trainable=tiny_base.weights.num_parameters)
    report: dict[str, Any] = build_report(spec, tiny_base, found)
    assert report["adapter"] is None
    assert report["trainable_share"] == 1.0
    assert report["evaluation"] is None
    assert report["recall"] is None
    assert report["comparisons"] == {"base": None, "latest": None, "parent": None}
    assert report["lineage"] is None
    assert report["gate"] == {"publish_if": "always", "passes": True, "reason": report["gate"]["reason"]}


def test_evaluations_that_were_not_needed_are_null(tiny_base: BaseModel) -> None:
    """Rows without completions have no exact match; a perplexity stays finite."""
    text = Scores(Evaluation(loss=1e5, accuracy=0.0, num_rows=1, num_tokens=3))
    gate = decide("improves_base", {"base": Comparison("loss", 1, False, 1e5, 1e5)})
    found = replace(FOUND, base=text, tuned=text, latest=None, gate=gate)
    report = json.loads(json.dumps(build_report(SPEC, tiny_base, found), allow_nan=False))
    assert report["evaluation"]["latest"] is None
    assert report["evaluation"]["tuned"]["exact_match"] is None
    assert report["evaluation"]["tuned"]["perplexity"] > 1e300
    assert report["gate"]["passes"] is False


@pytest.mark.parametrize("num_points", [1, MAX_POINTS - 1, MAX_POINTS, MAX_POINTS + 1, 10_007])
def test_long_curves_are_thinned_out(num_points: int, tiny_base: BaseModel) -> None:
    curve = [(step, 1.0 / (1 + step)) for step in range(num_points)]
    found = replace(FOUND, curves={"train_loss": curve, "eval_loss": []})
    report: dict[str, Any] = build_report(SPEC, tiny_base, found)
    points = report["curves"]["train_loss"]
    assert len(points) == min(num_points, MAX_POINTS)
    assert points[0] == [0, 1.0]
    assert points[-1] == list(curve[-1])
    steps = [step for step, _ in points]
    gaps = {after - before for before, after in pairwise(steps)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1, "evenly"
    assert all(list(curve[step]) == [step, loss] for step, loss in points)
    assert report["curves"]["eval_loss"] == []


def test_names_and_descriptions_change_nothing_else(tiny_base: BaseModel) -> None:
    """The same job under another name: its card differs where the name is, and nowhere else."""
    one = build_report(SPEC, tiny_base, FOUND)
    other = build_report(replace(SPEC, name="films", description=""), tiny_base, FOUND)
    assert {key for key in one if one[key] != other[key]} == {"name", "description", "config"}


def test_the_environment(tiny_base: BaseModel) -> None:
    found = Environment.of(tiny_base)
    assert found.device == "cpu"
    assert found.dtype == "fp32"
    assert found.threads == torch.get_num_threads()
    assert found.versions["torch"] == torch.__version__
    assert set(found.versions) == {"smolora", "python", "torch"}
    with pytest.raises(KeyError):
        Environment.of(replace(tiny_base, weights=replace(tiny_base.weights, embed=torch.zeros(1).double())))


def test_the_environment_of_a_gpu(tiny_base: BaseModel) -> None:
    with fake_cuda(Card(name="NVIDIA L4", capabilities=((8, 9),), reserved_bytes=123)):
        found = Environment.of(on_card(tiny_base), ("torch on NVIDIA L4",))
        peak = peak_memory_bytes(torch.device("cuda"))
    assert (found.device, found.gpu) == ("cuda", "NVIDIA L4, compute capability 8.9")
    assert set(found.versions) == {"smolora", "python", "torch", "cuda", "driver"}
    assert peak == 123, "what was taken from the GPU, not what tensors took of that"


def test_pissa_reports_the_published_rank(tiny_base: BaseModel) -> None:
    adapter = AdapterFacts("12" * 32, LoraConfig(16, 32.0, ("q_proj",)), 10_000)
    found = replace(FOUND, adapter=adapter, gate=Gate("always", True, "published whatever its loss is"))
    report: dict[str, Any] = build_report(SPEC, tiny_base, found)
    assert report["adapter"]["rank"] == 16
    assert report["adapter"]["parameters"] == 10_000
    assert report["trainable_parameters"] == 5000


def test_peak_memory_is_this_programs() -> None:
    """A program that holds 200 MB and lets them go, started by one that holds more."""
    ballast = bytearray(os.urandom(1)) * (600 << 20)
    script = (
        "import torch\n"
        "from server.training.report import peak_memory_bytes\n"
        "before = peak_memory_bytes(torch.device('cpu'))\n"
        "held = torch.ones(50 << 20)\n"
        "del held\n"
        "print(before, peak_memory_bytes(torch.device('cpu')))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    before, after = map(int, answer.stdout.split())
    assert 150 << 20 <= after - before <= 260 << 20
    assert before < peak_memory_bytes(CPU) - len(ballast) // 2


def test_peak_memory_without_linux(tmp_path: Path) -> None:
    assert peak_memory_bytes(CPU, tmp_path / "nothing") > 10 << 20
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n")
    assert peak_memory_bytes(CPU, tmp_path / "status") == 2048 * 1024
