"""A job's rows on disk. They are tokenized once, when the job is submitted. The worker reads no other rows.

HOME/jobs/<id>/train.safetensors        rows to train on
               validation.safetensors   held-out rows, if there are any
               test.safetensors         rows that are measured once, at the end, if there are any
               data.json                facts about the data for the report, references for exact match, samples,
                                        and the digest of the base that the rows were tokenized for
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import SmoloraError
from adapters.storage.durable import new_file
from server.decisions.stored import KEY as DECISIONS
from server.decisions.stored import StoredDecisions
from server.training.encoding import Asked, Examples, Reference, Sample
from server.training.spec import read_document

if TYPE_CHECKING:
    from server.model.base.weights import BaseModel

DATA_NAME = "data.json"
"""Written last, so that a directory with this file is complete."""
TRAIN_NAME, VALIDATION_NAME, TEST_NAME = "train.safetensors", "validation.safetensors", "test.safetensors"


class AnotherBase(SmoloraError):
    """The rows were tokenized for another base than the worker's."""


@dataclass(frozen=True)
class DataFacts:
    """Facts about the training, held-out and test rows. Digests are those of `CanonicalRows.digest`.

    Each window of a split row counts as a row, and a dropped row counts in `num_dropped` alone.
    """

    digest: str
    num_rows: int
    num_tokens: int  # of one pass over the rows
    num_targets: int  # tokens that are trained on
    num_truncated: int
    validation_digest: str | None = None
    num_validation_rows: int = 0
    num_validation_truncated: int = 0
    num_overlapping: int = 0  # held-out rows that are also training rows
    test_digest: str | None = None
    num_test_rows: int = 0
    num_test_overlapping: int = 0  # test rows that are also training rows or held-out rows
    num_split: int = 0  # rows split into windows, of all parts
    num_dropped: int = 0  # rows, of all parts
    num_lost_tokens: int = 0  # of dropped and truncated rows, of all parts
    kinds: Mapping[str, int] = field(default_factory=dict)  # training rows by kind; empty for an older job


@dataclass(frozen=True)
class TestRows:
    """Rows that nothing is chosen by. Fields are as in `JobData`."""

    __test__ = False  # pytest takes it for a test otherwise

    examples: Examples
    references: Sequence[Reference]
    asked: Sequence[Asked] = ()


@dataclass(frozen=True)
class JobData:
    """The rows of a job.

    Greedy completions are compared with the texts in `references` (of held-out rows) and `trained_references`.
    """

    train: Examples
    validation: Examples | None
    references: Sequence[Reference]
    facts: DataFacts
    base_digest: str  # of the base that the rows were tokenized for
    trained_references: Sequence[Reference] = ()
    decisions: StoredDecisions | None = None  # if there are rows of decisions
    asked: Sequence[Asked] = ()  # held-out decisions, to fit temperatures
    options: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """The tokens of each question's options, by the question's digest."""
    samples: Sequence[Sample] = ()
    test: TestRows | None = None

    @property
    def of_test(self) -> "JobData | None":
        """The same job with its test rows in place of the held-out rows, to measure them in the same way."""
        if self.test is None:
            return None
        return replace(
            self,
            validation=self.test.examples,
            references=self.test.references,
            asked=self.test.asked,
            trained_references=(),
            samples=(),
        )

    def check_base(self, base: "BaseModel") -> None:
        """Raise AnotherBase if the rows were tokenized for another base."""
        check_base(self.base_digest, base)

    def save(self, directory: Path) -> None:
        """Write all files, `data.json` last. Raise OSError if that fails."""
        directory.mkdir(parents=True, exist_ok=True)
        self.train.save(directory / TRAIN_NAME)
        if self.validation is not None:
            self.validation.save(directory / VALIDATION_NAME)
        rest = {
            "base_digest": self.base_digest,
            "facts": asdict(self.facts),
            "references": [asdict(r) for r in self.references],
            "trained_references": [asdict(r) for r in self.trained_references],
            **({} if self.decisions is None else {DECISIONS: self.decisions.document()}),
            "asked": [asdict(one) for one in self.asked],
            "options": dict(self.options),
            "samples": [asdict(one) for one in self.samples],
        }
        if self.test is not None:
            self.test.examples.save(directory / TEST_NAME)
            rest |= {
                "test_references": [asdict(r) for r in self.test.references],
                "test_asked": [asdict(one) for one in self.test.asked],
            }
        with new_file(directory / DATA_NAME) as unfinished:
            unfinished.write_text(json.dumps(rest), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "JobData":
        """Read what `save` wrote. Raise OSError if the files are missing."""
        rest = json.loads((directory / DATA_NAME).read_text(encoding="utf-8"))
        validation = directory / VALIDATION_NAME
        test = None
        if "test_references" in rest:
            test = TestRows(
                Examples.load(directory / TEST_NAME),
                read_document(list[Reference], rest["test_references"]),
                read_document(list[Asked], rest["test_asked"]),
            )
        return cls(
            train=Examples.load(directory / TRAIN_NAME),
            validation=Examples.load(validation) if validation.is_file() else None,
            references=read_document(list[Reference], rest["references"]),
            # missing in jobs that were submitted to an older release
            trained_references=read_document(list[Reference], rest.get("trained_references", [])),
            facts=read_document(DataFacts, rest["facts"]),
            base_digest=rest["base_digest"],
            decisions=StoredDecisions.of(rest),
            asked=read_document(list[Asked], rest.get("asked", [])),
            options=read_document(dict[str, tuple[tuple[int, ...], ...]], rest.get("options", {})),
            samples=read_document(list[Sample], rest.get("samples", [])),
            test=test,
        )


def check_base(digest: str, base: "BaseModel") -> None:
    """Raise AnotherBase if rows that were tokenized for the base with this digest are for another one."""
    if base.digest != digest:
        raise AnotherBase(
            f"the rows were tokenized for another base ({digest[:12]}) than the worker's, "
            f"{base.name} ({base.digest[:12]}): give server and worker the same SMOLORA_MODEL, submit again"
        )
