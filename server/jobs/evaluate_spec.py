"""The specification of an evaluation, as plain values that are stored with the job."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from adapters.catalog.versions import Part, combine
from adapters.lora import AdapterRef
from adapters.names import BASE
from server.jobs.tables import EVALUATE
from server.training.spec import read_document

Metric = Literal["loss", "token_accuracy", "exact_match", "json_valid", "accuracy", "brier"]
METRICS: tuple[Metric, ...] = get_args(Metric)
SHARES: frozenset[Metric] = frozenset({"exact_match", "json_valid", "accuracy"})
"""Metrics whose values are shares of right rows."""
MAX_TEXT_BYTES = 1000
"""The most bytes of an answer that is stored and shown."""


@dataclass(frozen=True)
class Candidate:
    """An adapter to measure: the request's expression, and the versions that it meant when it was submitted."""

    expression: str
    parts: tuple[Part, ...]  # none: the base

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        return combine(self.parts)


@dataclass(frozen=True)
class EvaluateSpec:
    """Adapters to measure on the first `limit` rows of each data set."""

    adapters: tuple[Candidate, ...]
    datasets: tuple[str, ...]
    metrics: tuple[Metric, ...]  # each is measured on the rows that it fits
    limit: int

    @property
    def name(self) -> str:
        """The base's name, since the job publishes no adapter. The job's time is charged to this name."""
        return BASE

    @property
    def parents(self) -> tuple[str, ...]:
        """Return the digests of the adapters that the job reads."""
        return tuple(sorted({ref.digest for candidate in self.adapters for ref in candidate.adapters}))

    def to_document(self) -> dict[str, object]:
        """Return a JSON-ready document."""
        return {"kind": EVALUATE, **asdict(self)}

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> "EvaluateSpec":
        """Read a document that `to_document` returned. Raise ValueError for any other document."""
        return read_document(cls, document)
