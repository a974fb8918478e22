"""One attempt at an evaluation: measure each adapter on the same rows, and store the findings.

Losses are computed by the code that measures a training's held-out rows, completions and decisions by the serving
engine. A checkpoint after each adapter has its measurements, so an interrupted job goes on with the next adapter.
"""

import ctypes
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import cast

from adapters.errors import InvalidInput, SmoloraError
from adapters.library import Library
from adapters.merge import WeightedAdapters, stacked
from server.decisions.answers import probabilities
from server.errors import GenerationFailed
from server.jobs.evaluate_spec import Candidate, EvaluateSpec
from server.jobs.evaluation import Answers, Measured, TokenSums, find, judge, max_text_bytes
from server.jobs.evaluation_data import EvaluatedRow, EvaluationData
from server.jobs.files import JobFiles
from server.jobs.leases import Claim, Leases
from server.jobs.scoring import MORE_JSON_TOKENS, MORE_TOKENS, completions, option_scores
from server.jobs.tables import EVALUATE
from server.model.base.weights import BaseModel
from server.model.device import is_out_of_memory
from server.storage.places import Storage
from server.training.checkpoint import Checkpoint, Checkpoints
from server.training.evaluate import mean_loss, token_scores
from server.training.run import Reporter
from server.training.spec import read_document
from server.training.trainables import trainable_rows


class NotMeasurable(SmoloraError):
    """An adapter can't be measured, for example because the model's numbers overflow under it."""


class StepFailed(Exception):
    """A step of the engine failed, for example for want of memory. Another attempt may succeed."""


class EvaluationAttempt:
    """An attempt. `run` measures and ends the job, or raises Leave, LeaseLost, or an error.

    If the error is a SmoloraError, every further attempt would raise it again. After a StepFailed, the job is
    claimed again.
    """

    def __init__(
        self,
        spec: EvaluateSpec,
        claim: Claim,
        leases: Leases,
        library: Library,
        base: BaseModel,
        reporter: Reporter,
        storage: Storage,
        native: ctypes.CDLL | None = None,
        require_room: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """`native` is the compiled library, or None to compute with torch.

        `require_room` is as in `TrainingAttempt`.
        """
        self._spec = spec
        self._claim = claim
        self._leases = leases
        self._library = library
        self._base = base
        self._reporter = reporter
        self._native = native
        self._require_room = require_room
        files = JobFiles(storage.home.path, storage.bucket)
        self._directory = files.directory(claim.job_id)
        place = files.checkpoints(claim.job_id)
        self._checkpoints = Checkpoints(place, claim.token, storage.bucket, claim.job_id)

    def run(self) -> None:
        candidates = self._spec.adapters
        data = EvaluationData.load(self._directory)
        data.check_base(self._base)
        found = self._checkpoints.newest()
        measured = [] if found is None else self._read(found, data)
        progress: Mapping[str, object] = {"step": len(measured), "total_steps": len(candidates)}
        for number in range(len(measured), len(candidates)):
            answers = self._measure(candidates[number], data, data.temperatures[number])
            measured.append(judge(answers, data, max_text_bytes(data, len(candidates))))
            progress = {"step": number + 1, "total_steps": len(candidates)}
            self._reporter.metrics(f"measured {candidates[number].expression}", {"step": number + 1})
            self._reporter.flush()
            state = {"measured": [asdict(one) for one in measured]}
            self._checkpoints.save(Checkpoint(number + 1, {}, state))
            self._reporter.checkpointed(number + 1)
            self._reporter.progress(progress, {})
        report = {
            "format": 1,
            "kind": EVALUATE,
            **asdict(find(self._spec, data, measured)),
            "base_model": {"name": self._base.name, "digest": self._base.digest},
            "config": self._spec.to_document(),
        }
        num_bytes = len(json.dumps(report))
        self._require_room(num_bytes)
        ended = {**progress, "eta_seconds": 0.0}
        self._leases.succeed(self._claim, progress=ended, metrics={}, report=report, num_bytes=num_bytes)

    def _read(self, checkpoint: Checkpoint, data: EvaluationData) -> list[Measured]:
        """Return the measurements of a checkpoint. An earlier release stored the answers themselves."""
        stored = cast("Sequence[Mapping[str, object]]", checkpoint.state["measured"])
        if "probabilities" in stored[0]:
            limit = max_text_bytes(data, len(self._spec.adapters))
            return [judge(answers, data, limit) for answers in read_document(list[Answers], stored)]
        return read_document(list[Measured], stored)

    def _measure(self, candidate: Candidate, data: EvaluationData, temperatures: Mapping[str, float]) -> Answers:
        """Measure one adapter. `temperatures` are those of its questions, by digest."""
        adapters, metrics = self._load(candidate), set(self._spec.metrics)
        losses: Mapping[str, float] = {}
        tokens: Sequence[TokenSums | None] = _nothing(data)
        completed: Sequence[str | None] = _nothing(data)
        probable: Sequence[tuple[float, ...] | None] = _nothing(data)
        try:
            if metrics & {"loss", "token_accuracy"}:
                losses, tokens = self._measure_tokens(candidate, adapters, data)
            if metrics & {"exact_match", "json_valid"}:
                completed = self._complete(adapters, data.rows)
            if metrics & {"accuracy", "brier"}:
                probable = self._decide(adapters, data, temperatures)
        except InvalidInput as error:
            raise NotMeasurable(f"{candidate.expression} can't be measured: {error}") from None
        except GenerationFailed as error:
            raise StepFailed(str(error)) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            advice = "shorten the rows, or take adapters of lower rank"
            raise NotMeasurable(f"{candidate.expression} takes too much memory: {advice}") from error
        return Answers(losses, tokens, completed, probable)

    def _load(self, candidate: Candidate) -> WeightedAdapters:
        loaded = []
        for digest, weight in candidate.adapters:
            self._reporter.yield_or_leave()
            self._library.verify(digest)
            loaded.append((self._library.load(digest), weight))
        return loaded

    def _measure_tokens(
        self, candidate: Candidate, adapters: WeightedAdapters, data: EvaluationData
    ) -> tuple[dict[str, float], list[TokenSums | None]]:
        """Return the loss on each data set, and the sums of each row."""
        is_one = len(adapters) == 1 and adapters[0][1] == 1
        weights = adapters[0][0] if is_one else stacked(adapters)
        longest = max(data.examples.lengths)
        passes = trainable_rows(
            self._base, weights, None, max_length=longest, dropout=0.0, library=self._native
        ).passes
        losses: dict[str, float] = {}
        tokens: list[TokenSums | None] = [*_nothing(data)]
        for dataset in self._spec.datasets:
            chosen = [n for n, place in enumerate(data.examples.sources) if data.rows[place].dataset == dataset]
            scores = token_scores(
                passes,
                [data.examples[number] for number in chosen],
                yield_or_leave=self._reporter.yield_or_leave,
                computing=self._reporter.computing,
            )
            losses[dataset] = mean_loss(scores)
            if not math.isfinite(losses[dataset]):
                raise NotMeasurable(f"{candidate.expression} can't be measured: its loss is not a number")
            for number, one in zip(chosen, scores, strict=True):
                place = data.examples.sources[number]
                before = tokens[place] or TokenSums(0.0, 0, 0)
                tokens[place] = TokenSums(
                    before.loss + math.fsum(one.losses),
                    before.num_right + one.num_right,
                    before.num_tokens + len(one.losses),
                )
        return losses, tokens

    def _complete(self, adapters: WeightedAdapters, rows: Sequence[EvaluatedRow]) -> list[str | None]:
        """Return the completion of each row that has a reference and is measured by its completion."""
        needs_all = "exact_match" in self._spec.metrics
        chosen = [place for place, row in enumerate(rows) if row.reference and (needs_all or row.schema)]
        texts = completions(
            self._base,
            adapters,
            [reference for place in chosen if (reference := rows[place].reference)],
            self._reporter.yield_or_leave,
            self._native,
            more_tokens=[MORE_TOKENS if rows[place].schema is None else MORE_JSON_TOKENS for place in chosen],
        )
        found = dict(zip(chosen, texts, strict=True))
        return [found.get(place) for place in range(len(rows))]

    def _decide(
        self, adapters: WeightedAdapters, data: EvaluationData, temperatures: Mapping[str, float]
    ) -> list[tuple[float, ...] | None]:
        """Return the probabilities of the options of each row that is a decision."""
        asked = {place: row.asked for place, row in enumerate(data.rows) if row.asked is not None}
        yield_or_leave = self._reporter.yield_or_leave
        scores = option_scores(
            self._base, adapters, list(asked.values()), data.options, yield_or_leave, self._native
        )
        found: dict[int, tuple[float, ...]] = {}
        for (place, one), of_row in zip(asked.items(), scores, strict=True):
            found[place] = tuple(probabilities(of_row, temperatures.get(one.question, 1.0)))
        return [found.get(place) for place in range(len(data.rows))]


def _nothing(data: EvaluationData) -> list[None]:
    """Return the measurements of rows that aren't measured in some way."""
    return [None] * len(data.rows)
