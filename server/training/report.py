"""The report on a training job: its adapter, data and cost, and an evaluation against the base.

`build_report` makes the JSON of GET /train/{id}/report from a job's findings. `model_card` makes a README.md from
that report, for people who download the adapter. Neither contains a row's text. The caller stores both.
"""

import csv
import io
import platform
import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

import server
from adapters.lora import LoraConfig
from server.model.base.weights import BaseModel
from server.model.device import driver_version, gpu_of
from server.training.evaluate import Evaluation, Scores
from server.training.job_data import DataFacts
from server.training.spec import JobSpec, Method, PublishIf
from server.training.verdicts import Comparison

MAX_POINTS = 500
"""Points of each curve in the report; a longer curve is thinned out evenly. The job's events have every step."""
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_STATUS = Path("/proc/self/status")
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")

Curve = Sequence[tuple[int, float]]
"""(optimizer steps done, nats per counted token), in order."""
Other = Literal["base", "latest", "parent"]
NAMES: Mapping[Other, str] = {"base": "the untouched base", "latest": "latest", "parent": "its parent"}
"""Names of what the tuned weights are compared with, in sentences."""
Comparisons = Mapping[Other, Comparison | None]
"""An entry for each of the three that exists. It is None if nothing was measured that can be compared."""


@dataclass(frozen=True)
class Gate:
    """The decision on `publish_if`. `reason` is a sentence for readers of the report."""

    publish_if: PublishIf
    passes: bool
    reason: str


def decide(
    publish_if: PublishIf,
    comparisons: Comparisons,
    method: Method = "lora",
    versions: Mapping[Other, str] = MappingProxyType({}),
    unmeasured: Mapping[Other, str] = MappingProxyType({}),
) -> Gate:
    """Decide whether to publish the tuned adapter, by its comparison with the latest version or the base.

    If neither `comparisons` nor `unmeasured` has the latest version, none exists, and the base takes its place.
    `unmeasured` says why a version wasn't measured; if the decision needs that version, the adapter isn't
    published. A fully fine-tuned model is never published. `versions` has names of the compared versions, for the
    text of the reason.
    """
    if method == "full":
        return Gate(publish_if, False, "a fully fine-tuned model is kept with its job, but it is no adapter")
    if publish_if == "always":
        return Gate(publish_if, True, "published whatever its loss is")
    is_first = "latest" not in comparisons and "latest" not in unmeasured
    other: Other = "base" if publish_if == "improves_base" or is_first else "latest"
    if other in unmeasured:
        return Gate(publish_if, False, f"can't be decided: {unmeasured[other]}")
    found, name = comparisons[other], versions.get(other, NAMES[other])
    if found is None:
        return Gate(publish_if, publish_if == "not_worse", f"nothing was measured to compare it with {name}")
    passes = found.verdict == "better" or (publish_if == "not_worse" and found.verdict == "can't tell")
    return Gate(publish_if, passes, found.sentence(name))


@dataclass(frozen=True)
class Cost:
    """The steps, tokens, time, memory and storage that a job took."""

    num_steps: int  # optimizer steps
    kept_step: int  # the step whose weights were kept: the last, or the best by evaluation
    epochs: float
    num_tokens: int  # inputs of all steps, without padding
    tokens_per_second: float
    wall_seconds: float
    peak_memory_bytes: int
    bytes_stored: int


@dataclass(frozen=True)
class Environment:
    """Everything that the bytes of a result depend on, besides data, base, seed and configuration."""

    device: str
    dtype: str
    threads: int
    instructions: str  # the instruction set of torch's CPU kernels
    versions: Mapping[str, str]
    computed_by: Sequence[str] = ("torch",)  # or "torch on" a GPU, or native source and compiler; all of them
    gpu: str | None = None  # the GPU's name and compute capability; None on a CPU

    @classmethod
    def of(cls, base: BaseModel, computed_by: Sequence[str] = ("torch",)) -> "Environment":
        """Describe this process, training on `base`."""
        versions = {
            "smolora": server.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        gpu = None
        if base.device.type == "cuda":
            gpu = str(gpu_of(base.device))
            versions |= {"cuda": torch.version.cuda or "unknown", "driver": driver_version() or "unknown"}
        return cls(
            device=str(base.device),
            gpu=gpu,
            dtype=_DTYPES[base.dtype],
            threads=torch.get_num_threads(),
            instructions=torch.backends.cpu.get_cpu_capability(),
            versions=versions,
            computed_by=tuple(computed_by),
        )


@dataclass(frozen=True)
class AdapterFacts:
    """The adapter's files. `config` is the published adapter's, with twice the rank for pissa and olora."""

    digest: str
    config: LoraConfig
    num_parameters: int


@dataclass(frozen=True)
class Findings:
    """The results of a job. `latest` and `parent` are None if there is no such version, or it wasn't measured.

    `versions` names the compared versions, such as "codes@1".
    """

    data: DataFacts
    cost: Cost
    environment: Environment
    num_trainable: int
    adapter: AdapterFacts | None  # None: full fine-tuning
    gate: Gate
    curves: Mapping[str, Curve]  # by metric, such as train_loss
    base: Scores
    tuned: Scores
    latest: Scores | None = None
    parent: Scores | None = None
    on_test: Mapping[Literal["base", "tuned"], Scores] | None = None  # None: there are no test rows
    test_comparison: Comparison | None = None  # with the base, on test rows
    comparisons: Comparisons = field(default_factory=dict)
    versions: Mapping[Other, str] = field(default_factory=dict)
    unmeasured: Mapping[Other, str] = field(default_factory=dict)  # sentences: why a version wasn't measured
    decisions: Mapping[str, object] | None = None  # by question; None: the job has no decisions

    @property
    def measured(self) -> dict[str, Scores | None]:
        """All measurements, by their names in the report."""
        return {"base": self.base, "tuned": self.tuned, "latest": self.latest, "parent": self.parent}


def build_report(spec: JobSpec, base: BaseModel, found: Findings) -> dict[str, object]:
    """Return the JSON-ready report. Losses must be finite: a job with any other loss fails earlier."""
    num_base = base.weights.num_parameters
    lineage = {"start_from": spec.start_from, "digest": spec.start_from_digest} if spec.start_from else None
    return {
        "format": 1,
        "name": spec.name,
        "description": spec.description,
        "method": spec.method,
        "base_model": {"name": base.name, "digest": base.digest, "parameters": num_base},
        "adapter": None if found.adapter is None else adapter_document(found.adapter),
        "trainable_parameters": found.num_trainable,
        "trainable_share": found.num_trainable / num_base,
        "evaluation": _evaluation(found),
        "test": _test(found),
        "recall": _recall(found),
        "decisions": found.decisions,
        "comparisons": {name: _comparison(found, name) for name in NAMES},
        "unmeasured": dict(found.unmeasured),
        "moves_latest": None,  # known once the version is published
        "gate": asdict(found.gate),
        "steps": found.cost.num_steps,
        "kept_step": found.cost.kept_step,
        "epochs": found.cost.epochs,
        "tokens": found.cost.num_tokens,
        "tokens_per_second": found.cost.tokens_per_second,
        "wall_seconds": found.cost.wall_seconds,
        "peak_memory_bytes": found.cost.peak_memory_bytes,
        "bytes_stored": found.cost.bytes_stored,
        "data": _data(found.data),
        "lineage": lineage,
        "config": spec.to_document(),
        "environment": asdict(found.environment),
        "curves": {name: [list(point) for point in _thinned(curve)] for name, curve in found.curves.items()},
    }


def adapter_document(facts: AdapterFacts) -> dict[str, object]:
    """Return the report's entry on the adapter's files."""
    config = facts.config
    return {
        "digest": facts.digest,
        "rank": config.rank,
        "alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.target_modules),
        "parameters": facts.num_parameters,
    }


def _evaluation(found: Findings) -> dict[str, object] | None:
    """Return the evaluations on the held-out rows."""
    return _measurements(found.measured)


def _test(found: Findings) -> dict[str, object] | None:
    """Return base and adapter on the test rows, and their comparison."""
    if found.on_test is None:
        return None
    comparison = found.test_comparison
    return {
        **(_measurements(found.on_test) or {}),
        "comparison": None if comparison is None else comparison.document(None, NAMES["base"], "test"),
    }


def _measurements(scores: Mapping[Any, Scores | None]) -> dict[str, object] | None:
    """Return the evaluations by the names of weights, or None if `tuned` has none."""
    held_out = {name: None if of is None else of.held_out for name, of in scores.items()}
    tuned = held_out["tuned"]
    if tuned is None:
        return None
    return {
        "num_rows": tuned.num_rows,
        "num_tokens": tuned.num_tokens,
        "num_completions": len(tuned.matches or ()),
        **{name: None if of is None else _measures(of) for name, of in held_out.items()},
    }


def _recall(found: Findings) -> dict[str, object] | None:
    """Return how many training rows base, adapter and versions complete exactly, or None if not measured."""
    if found.tuned.recalled is None:
        return None
    right = {
        name: None if of is None or of.recalled is None else sum(of.recalled)
        for name, of in found.measured.items()
    }
    return {"num_rows": len(found.tuned.recalled), "num_right": right}


def _comparison(found: Findings, name: Other) -> dict[str, object] | None:
    comparison, version = found.comparisons.get(name), found.versions.get(name)
    other = NAMES[name] if version is None else f"{version}, its parent" if name == "parent" else version
    return None if comparison is None else comparison.document(version, other)


def _measures(evaluation: Evaluation) -> dict[str, object]:
    return {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "accuracy": evaluation.accuracy,
        "exact_match": evaluation.exact_match,
    }


def _data(facts: DataFacts) -> dict[str, object]:
    return {
        "digest": facts.digest,
        "rows": facts.num_rows,
        "tokens": facts.num_tokens,
        "trained_tokens": facts.num_targets,
        "truncated": facts.num_truncated,
        "validation_digest": facts.validation_digest,
        "validation_rows": facts.num_validation_rows,
        "validation_truncated": facts.num_validation_truncated,
        "overlap": facts.num_overlapping,
        "test_digest": facts.test_digest,
        "test_rows": facts.num_test_rows,
        "test_overlap": facts.num_test_overlapping,
        "split": facts.num_split,
        "dropped": facts.num_dropped,
        "lost_tokens": facts.num_lost_tokens,
    }


def _thinned(curve: Curve) -> Curve:
    """Return at most `MAX_POINTS` of the curve's points, evenly spread, with the first and the last."""
    if len(curve) <= MAX_POINTS:
        return curve
    last = len(curve) - 1
    return [curve[i * last // (MAX_POINTS - 1)] for i in range(MAX_POINTS)]


def step_metrics_csv(train: Curve, held_out: Curve, step: int, tuned: Evaluation | None) -> bytes:
    """Return the metrics of a finished run's steps as the CSV that OpenAI's clients read from a job's result file.

    There is a line for each step of `train`. `tuned` is the evaluation of the weights that were kept, those after
    step `step`. Values that weren't measured are empty; accuracy in training isn't measured at all.
    """
    losses = dict(held_out)
    accuracies: dict[int, float] = {}
    if tuned is not None:
        losses[step] = tuned.loss
        accuracies[step] = tuned.accuracy
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, loss in train:
        writer.writerow((number, loss, "", losses.get(number, ""), accuracies.get(number, "")))
    return text.getvalue().encode()


def peak_memory_bytes(device: torch.device, status: Path = _STATUS) -> int:
    """Return this process's peak memory: the GPU memory that torch reserved, or without a GPU the resident memory.

    Resident memory includes mapped weights.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        # VmHWM is this program's alone; getrusage's value includes the process before its exec.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
