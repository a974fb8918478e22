"""The specification of a merge job, as plain values that are stored with the job."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from adapters.catalog.versions import Origin, Part
from adapters.expression import Term, render
from adapters.merge_recipe import MergeMethod, Recipe
from server.jobs.tables import MERGE
from server.training.spec import read_document

ORIGIN = "origin"
"""The key in a merge's `Job.data` for the `Origin` of the adapters, which may be deleted before the job ends."""


@dataclass(frozen=True)
class MergeSpec:
    """A merge to compute. `parts` are the adapter versions to merge, in the order of the request's expression."""

    name: str
    parts: tuple[Part, ...]
    recipe: Recipe

    @property
    def method(self) -> MergeMethod:
        return self.recipe.method

    @property
    def expression(self) -> str:
        """Return the expression with each adapter's version, such as "tweets@3*0.7+movies@2*0.3"."""
        return render(Term(part.name, part.version, weight=part.weight) for part in self.parts)

    @property
    def parents(self) -> tuple[str, ...]:
        """Return the digests of the adapters that the merge reads."""
        return tuple(sorted({part.digest for part in self.parts}))

    def to_document(self) -> dict[str, object]:
        """Return a JSON-ready document."""
        return {
            "kind": MERGE,
            "name": self.name,
            "expression": self.expression,
            **asdict(self.recipe),
            "parts": [asdict(part) for part in self.parts],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> "MergeSpec":
        """Read a document that `to_document` returned. Raise ValueError for any other document."""
        recipe = {name: document.get(name) for name in Recipe.__dataclass_fields__}
        fields = {"name": document.get("name"), "parts": document.get("parts"), "recipe": recipe}
        return read_document(cls, fields)


def read_origin(data: Mapping[str, object]) -> Origin:
    """Read from a merge's `Job.data` which base the merged adapters were trained on."""
    return read_document(Origin, data[ORIGIN])
