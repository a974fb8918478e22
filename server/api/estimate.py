"""Estimate how long a training job takes.

The training speed is that of the last job with the same method, kind of device and size of base model. If there is
no such job, the speed is derived from the time of a matrix product, and the estimate is accurate to a factor of
about two. The estimate doesn't include pauses in which the job lets requests run.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from pydantic import Field

from server.jobs.jobs import Job, Jobs, Status
from server.model.device import gpu_of, multiplied_dtype
from server.training.job_data import JobData
from server.training.spec import JobSpec, Method

_PASSES = {"lora": 2, "full": 3}
"""Cost of a training step by method, as a multiple of the cost of a forward pass over the same tokens."""
_EFFICIENCY = 0.4
"""FLOPS of a training step, as a share of the FLOPS of a large matrix product."""
_ROWS, _IN, _OUT = 1024, 576, 1536
_SEEN_JOBS = 50


Basis = Literal["an earlier job", "a matrix product"]


@dataclass(frozen=True)
class Estimate:
    """A job's estimated duration if nothing else uses the machine."""

    seconds: float
    tokens_per_second: float
    basis: Annotated[Basis, Field(description="the source of the speed")]


class Estimator:
    """Estimates training times on one base model. The methods block, so call them in a thread."""

    def __init__(self, jobs: Jobs, num_parameters: int, dtype: torch.dtype, device: torch.device) -> None:
        self._jobs = jobs
        self._num_parameters = num_parameters
        self._dtype = multiplied_dtype(dtype, device)
        self._device = device

    def estimate(self, spec: JobSpec, data: JobData) -> Estimate:
        """Estimate the time of all training steps and of all evaluations on held-out rows and test rows.

        `data` may be a sample of the rows; `data.facts` counts all rows.
        """
        rate, basis = self._speed(spec.method)
        training, num_rows = spec.training, data.facts.num_rows
        steps = training.total_steps(num_rows)
        epochs = steps / training.steps_per_epoch(num_rows)
        seconds = epochs * data.facts.num_tokens / rate
        if data.validation is not None:
            num_evaluations = 2 + (steps // training.eval_steps if training.eval_steps else 0)
            num_tokens = data.validation.num_tokens * data.facts.num_validation_rows / len(data.validation)
            seconds += num_evaluations * num_tokens / (rate * _PASSES[spec.method])
        if data.test is not None:  # base and adapter
            num_tokens = data.test.examples.num_tokens * data.facts.num_test_rows / len(data.test.examples)
            seconds += 2 * num_tokens / (rate * _PASSES[spec.method])
        return Estimate(seconds, rate, basis)

    def _speed(self, method: Method) -> tuple[float, Basis]:
        """Return the training speed in tokens per second, and the source of that figure."""
        for job in self._jobs.list(Status.SUCCEEDED, _SEEN_JOBS):
            rate = job.progress.get("tokens_per_second")
            if (
                not isinstance(job.spec, JobSpec)
                or job.spec.method != method
                or not isinstance(rate, int | float)
                or rate <= 0
            ):
                continue
            if self._is_comparable(job):
                return float(rate), "an earlier job"
        flops = 2.0 * self._num_parameters * _PASSES[method]
        return _EFFICIENCY * self._flops_per_second() / flops, "a matrix product"

    def _is_comparable(self, job: Job) -> bool:
        """Return whether the job ran on the same kind of device, and trained a base model of the same size."""
        card = self._jobs.report(job.id) or {}
        base = cast("Mapping[str, object]", card.get("base_model", {}))
        if base.get("parameters", self._num_parameters) != self._num_parameters:
            return False
        environment = cast("Mapping[str, object]", card.get("environment", {}))
        there = environment.get("gpu") or environment.get("device", "cpu")  # older cards name no GPU
        return there == (str(gpu_of(self._device)) if self._device.type == "cuda" else "cpu")

    def _flops_per_second(self) -> float:
        a = torch.ones(_ROWS, _IN, dtype=self._dtype, device=self._device)
        b = torch.ones(_IN, _OUT, dtype=self._dtype, device=self._device)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            float((a @ b)[0, 0])  # waits until a GPU is done
            best = min(best, time.perf_counter() - started)
        return 2.0 * _ROWS * _IN * _OUT / best
