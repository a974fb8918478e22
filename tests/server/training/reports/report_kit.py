"""What a job may have found, for the tests of reports."""

from dataclasses import replace

from adapters.lora import LoraConfig
from server.training.evaluate import Evaluation
from server.training.job_data import DataFacts
from server.training.report import AdapterFacts, Cost, Environment, Findings, decide
from server.training.spec import JobSpec, LoraSpec

BASE = Evaluation(loss=2.5, accuracy=0.4, num_rows=6, num_tokens=120, exact_match=0.0)
TUNED = replace(BASE, loss=0.5, accuracy=0.875, exact_match=0.5)
LATEST = replace(BASE, loss=0.75, accuracy=0.8, exact_match=0.25)

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
    gate=decide("improves_latest", TUNED, BASE, LATEST),
    curves={"train_loss": [(step, 3 / step) for step in range(1, 22)], "eval_loss": [(10, 0.75), (21, 0.5)]},
    base=BASE,
    tuned=TUNED,
    latest=LATEST,
)

UNMEASURED = replace(FOUND, base=None, tuned=None, latest=None, gate=decide("always", None, None))
