"""What a job may have found, for the tests of reports."""

from dataclasses import replace

from adapters.lora import LoraConfig
from server.training.evaluate import Evaluation, Scores
from server.training.job_data import DataFacts
from server.training.report import AdapterFacts, Comparisons, Cost, Environment, Findings, decide
from server.training.spec import JobSpec, LoraSpec
from server.training.verdicts import Comparison

NONE_RIGHT = (False,) * 4
BASE = Scores(Evaluation(2.5, 0.4, num_rows=6, num_tokens=120, matches=NONE_RIGHT), recalled=(False,) * 8)
TUNED = Scores(Evaluation(0.5, 0.875, 6, 120, matches=(True, True, False, False)), recalled=(True,) * 8)
LATEST = Scores(Evaluation(0.75, 0.8, 6, 120, matches=(True, False, False, False)), recalled=NONE_RIGHT * 2)
COMPARISONS: Comparisons = {
    "base": Comparison("exact_match", 12, True, 10 / 12, 0.0, 0.1, 0.5, 1.0),
    "latest": Comparison("exact_match", 12, True, 10 / 12, 1 / 12, 0.1, 0.4, 0.95),
}

SPEC = JobSpec(
    name="tweets",
    lora=LoraSpec(rank=8, alpha=16.0, target_modules=("q_proj", "v_proj")),
    start_from="tweets@2",
    start_from_digest="cd" * 32,
    publish_if="improves_latest",
    description="Short, and happy.",
)

FOUND = Findings(
    data=DataFacts(
        digest="ab" * 32,
        num_rows=54,
        num_tokens=1200,
        num_targets=300,
        num_truncated=2,
        validation_digest="ef" * 32,
        num_validation_rows=6,
        num_validation_truncated=1,
        num_overlapping=3,
    ),
    cost=Cost(
        num_steps=21,
        kept_step=21,
        epochs=3.0,
        num_tokens=3600,
        tokens_per_second=412.5,
        wall_seconds=31.25,
        peak_memory_bytes=1_500_000_000,
        bytes_stored=1_234_567,
    ),
    environment=Environment("cpu", "bf16", 2, "AVX512", {"smolora": "0.1.0", "torch": "2.13.0+cpu"}),
    num_trainable=5000,
    adapter=AdapterFacts("12" * 32, LoraConfig(8, 16.0, ("q_proj", "v_proj")), 5000),
    gate=decide("improves_latest", COMPARISONS),
    curves={"train_loss": [(step, 3 / step) for step in range(1, 22)], "eval_loss": [(10, 0.75), (21, 0.5)]},
    base=BASE,
    tuned=TUNED,
    latest=LATEST,
    comparisons=COMPARISONS,
    versions={"latest": "tweets@2"},
)

UNMEASURED = replace(
    FOUND,
    base=Scores(),
    tuned=Scores(),
    latest=None,
    comparisons={"base": None},
    versions={},
    gate=decide("always", {"base": None}),
)
