"""A job's rows on disk, tokenized once when the job is submitted: what its worker reads, and nothing else.

HOME/jobs/<id>/train.safetensors        rows to train on
               validation.safetensors   held-out rows, where there are any
               data.json                what the card says of the data, the references of exact match, and
                                        which base's tokens these are
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.errors import SmoloraError
from adapters.storage.durable import new_file
from server.model.base.weights import BaseModel
from server.storage.home import DATA_NAME, TRAIN_NAME, VALIDATION_NAME
from server.training.encoding import Examples, Reference, load_examples, save_examples
from server.training.spec import read_document


class AnotherBase(SmoloraError):
    """The rows are tokens of another base than the one that is to be trained on."""


@dataclass(frozen=True)
class DataFacts:
    """The rows: those of training, and those held out. Digests are `CanonicalRows.digest`'s."""

    digest: str
    num_rows: int
    num_tokens: int  # inputs of one pass
    num_targets: int  # tokens that are trained on
    num_truncated: int
    validation_digest: str | None = None
    num_validation_rows: int = 0
    num_validation_truncated: int = 0
    num_overlapping: int = 0  # held-out rows that are training rows too


@dataclass(frozen=True)
class JobData:
    """The rows of a job. `references` are what greedy completions of held-out rows are compared with."""

    train: Examples
    validation: Examples | None
    references: Sequence[Reference]
    facts: DataFacts
    base_digest: str  # of the base that they were tokenized for

    def check_base(self, base: BaseModel) -> None:
        """Raise AnotherBase if the rows were tokenized for another base than `base`."""
        if base.digest != self.base_digest:
            raise AnotherBase(
                f"the rows were tokenized for another base ({self.base_digest[:12]}) than the worker's, "
                f"{base.name} ({base.digest[:12]}): give server and worker the same SMOLORA_MODEL, submit again"
            )

    def save(self, directory: Path) -> None:
        """Write it all; `data.json` comes last, so a directory with it is whole. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        save_examples(directory / TRAIN_NAME, self.train)
        if self.validation is not None:
            save_examples(directory / VALIDATION_NAME, self.validation)
        rest = {
            "base_digest": self.base_digest,
            "facts": asdict(self.facts),
            "references": [asdict(r) for r in self.references],
        }
        with new_file(directory / DATA_NAME) as unfinished:
            unfinished.write_text(json.dumps(rest), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "JobData":
        """What `save` wrote. Raises OSError where it isn't there."""
        rest = json.loads((directory / DATA_NAME).read_text(encoding="utf-8"))
        validation = directory / VALIDATION_NAME
        return cls(
            train=load_examples(directory / TRAIN_NAME),
            validation=load_examples(validation) if validation.is_file() else None,
            references=read_document(list[Reference], rest["references"]),
            facts=read_document(DataFacts, rest["facts"]),
            base_digest=rest["base_digest"],
        )
