"""What a merge job is asked to do, as plain values that are stored with the job; and the two kinds of jobs.

A job's stored document says which kind it is: a merge's has `"kind": "merge"`, all others are training's.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from adapters.catalog.versions import Origin, Part
from adapters.expression import Term, render
from adapters.merge_recipe import MergeMethod, Recipe
from server.jobs.tables import MERGE
from server.training.spec import JobSpec, read_document

ORIGIN = "origin"
"""The part of a merge's `Job.data` that says which base its parts were made on: they may be gone when it ends."""


@dataclass(frozen=True)
class MergeSpec:
    """An adapter to make out of others. `parts` are as they were written, pinned to versions."""

    name: str
    parts: tuple[Part, ...]
    recipe: Recipe

    @property
    def method(self) -> MergeMethod:
        return self.recipe.method

    @property
    def expression(self) -> str:
        """Of the pinned parts, such as "tweets@3*0.7+movies@2*0.3"."""
        return render(Term(part.name, part.version, weight=part.weight) for part in self.parts)

    @property
    def parents(self) -> tuple[str, ...]:
        """The digests of the adapters whose bytes it needs."""
        return tuple(sorted({part.digest for part in self.parts}))

    def to_document(self) -> dict[str, object]:
        """JSON-ready, and as a reader would put it."""
        return {
            "kind": MERGE,
            "name": self.name,
            "expression": self.expression,
            **asdict(self.recipe),
            "parts": [asdict(part) for part in self.parts],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> "MergeSpec":
        """What `to_document` made. Raises ValueError on anything else."""
        recipe = {name: document.get(name) for name in Recipe.__dataclass_fields__}
        fields = {"name": document.get("name"), "parts": document.get("parts"), "recipe": recipe}
        return read_document(cls, fields)


Spec = JobSpec | MergeSpec


def read_spec(document: Mapping[str, object]) -> Spec:
    """What either `to_document` made. Raises ValueError on anything else."""
    return MergeSpec.from_document(document) if document.get("kind") == MERGE else JobSpec.from_document(document)


def read_origin(data: Mapping[str, object]) -> Origin:
    """Return the origin in a merge's `Job.data`."""
    return read_document(Origin, data[ORIGIN])
