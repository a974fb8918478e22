"""What POST /compositions/{name} takes. Without a method it names a blend; with one it asks for a merge job."""

from pydantic import ConfigDict, Field

from adapters.expression import MAX_LENGTH
from adapters.merging.recipe import Method
from server.api.schemas import MAX_SEED, Body
from server.api.train.schemas import MAX_TRAINED_RANK


class CompositionBody(Body):
    """POST /compositions/{name}."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"expression": "tweets*0.7+movies@2*0.3"},
                {"expression": "tweets*0.7+movies@2*0.3", "method": "ties", "density": 0.5},
                {"expression": "tweets+movies", "method": "svd", "rank": 16},
            ]
        }
    )

    expression: str = Field(max_length=MAX_LENGTH, description="an adapter expression, pinned to versions now")
    method: Method | None = Field(
        None,
        description="merge the parts into one new adapter, by a job; null: the exact sum, which needs no merging",
    )
    density: float | None = Field(
        None, gt=0, le=1, description="of a merge: the share of entries that is kept; null: 0.5, and all with svd"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="of dare_linear and dare_ties; null: 0")
    rank: int | None = Field(
        None,
        ge=1,
        le=MAX_TRAINED_RANK,
        description="the new adapter's: with it, the products B·A are merged and factored again; null: A and B "
        "are merged apart, which needs parts of equal ranks (svd: the largest rank of the parts)",
    )
