"""An evaluation's rows on disk. They are tokenized once, when the job is submitted.

HOME/jobs/<id>/validation.safetensors   the rows of all data sets, one after the other
               data.json                what the engine is asked about each row, and how answers are read
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.storage.durable import new_file
from server.model.base.weights import BaseModel
from server.training.encoding import Asked, Examples, Reference
from server.training.job_data import DATA_NAME, VALIDATION_NAME, check_base
from server.training.spec import read_document


@dataclass(frozen=True)
class EvaluatedRow:
    """A row, and what the engine is asked about it: to complete a prompt, to decide, or nothing."""

    dataset: str
    number: int  # within the data set, from 0
    reference: Reference | None = None
    asked: Asked | None = None
    schema: str | None = None  # that the completion is to satisfy; as `json_schema.canonical` returns it


@dataclass(frozen=True)
class EvaluationData:
    """The rows of an evaluation. Questions are named by their digests."""

    rows: Sequence[EvaluatedRow]
    examples: Examples  # its `sources` are indices of `rows`; rows that are too long have none
    options: Mapping[str, tuple[tuple[int, ...], ...]]  # the tokens of each question's options
    values: Mapping[str, tuple[str | bool, ...]]  # the options themselves
    temperatures: Sequence[Mapping[str, float]]  # of each adapter's questions
    base_digest: str  # of the base that the rows were tokenized for

    def check_base(self, base: BaseModel) -> None:
        """Raise AnotherBase if the rows were tokenized for another base."""
        check_base(self.base_digest, base)

    def save(self, directory: Path) -> None:
        """Write all files, `data.json` last. Raise OSError if that fails."""
        directory.mkdir(parents=True, exist_ok=True)
        self.examples.save(directory / VALIDATION_NAME)
        rest = {
            "rows": [asdict(row) for row in self.rows],
            "options": dict(self.options),
            "values": dict(self.values),
            "temperatures": [dict(one) for one in self.temperatures],
            "base_digest": self.base_digest,
        }
        with new_file(directory / DATA_NAME) as unfinished:
            unfinished.write_text(json.dumps(rest), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "EvaluationData":
        """Read what `save` wrote. Raise OSError if the files are missing."""
        rest = json.loads((directory / DATA_NAME).read_text(encoding="utf-8"))
        return cls(
            rows=read_document(list[EvaluatedRow], rest["rows"]),
            examples=Examples.load(directory / VALIDATION_NAME),
            options=read_document(dict[str, tuple[tuple[int, ...], ...]], rest["options"]),
            values=read_document(dict[str, tuple[str | bool, ...]], rest["values"]),
            temperatures=rest["temperatures"],
            base_digest=rest["base_digest"],
        )
