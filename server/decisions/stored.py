"""The questions, temperatures and prompt format that a version trained on decisions stores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server.decisions.prompts import FORMAT
from server.decisions.questions import Question, parse_question

KEY = "decisions"
"""The key of `Version.config` under which a version stores its `StoredDecisions`."""


@dataclass(frozen=True)
class StoredDecisions:
    """A version's questions, which all have names, and their temperatures by the questions' digests."""

    questions: tuple[Question, ...]
    temperatures: Mapping[str, float] = field(default_factory=dict)
    format: int = FORMAT

    def document(self) -> dict[str, object]:
        """Return JSON that `of` reads."""
        questions = {question.name or "": question.document() for question in self.questions}
        return {"format": self.format, "questions": questions, "temperatures": dict(self.temperatures)}

    @classmethod
    def of(cls, config: Mapping[str, object]) -> "StoredDecisions | None":
        """Return what a version's `config` stores, or None if the version wasn't trained on decisions."""
        document = config.get(KEY)
        if not isinstance(document, Mapping):
            return None
        questions = tuple(parse_question(question) for question in document["questions"].values())
        return cls(questions, document["temperatures"], document["format"])


def shared_questions(stored: Sequence[StoredDecisions | None]) -> tuple[Question, ...] | None:
    """Return the questions that all versions of a blend store, or None if they store different ones or none."""
    found = {one.questions if one is not None else None for one in stored}
    return found.pop() if len(found) == 1 else None
