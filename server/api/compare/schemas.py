"""What clients send to POST /compare, and are sent; `server.api.schemas` has the parts and the rules."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from adapters.expression import MAX_LENGTH
from server.api.generate.schemas import (
    Choice,
    GenerateAnswer,
    PromptBody,
    SampledLogprobAnswer,
    SamplingBody,
    StructureBody,
)

MAX_COMPARED = 16
MAX_SCORED = 16


class CompareBody(PromptBody, SamplingBody, StructureBody):
    """POST /compare."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "I felt", "adapters": ["base", "tweets", "tweets*0.5+movies*0.5"], "score": [" great"]}
            ]
        }
    )

    adapters: list[Annotated[str, Field(max_length=MAX_LENGTH)]] = Field(
        min_length=1, max_length=MAX_COMPARED, description='adapter expressions; "base": the frozen base'
    )
    score: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=MAX_SCORED, description="continuations whose log-probability is wanted, too"
    )


class ComparedChoice(Choice):
    logprob: float = Field(description="of the answer, its end token included: the sum over its tokens, in nats")


class ScoreAnswer(BaseModel):
    text: str
    logprob: float = Field(description="the sum over its tokens, in nats")
    num_tokens: int
    logprobs: list[SampledLogprobAnswer] | None = Field(description="of each token, where `logprobs` isn't 0")


class CompareResult(GenerateAnswer):
    adapter: str = Field(description="the expression, as it was sent")
    choices: Sequence[ComparedChoice]
    logprob: float = Field(description="the first choice's")
    scores: list[ScoreAnswer] | None


class CompareAnswer(BaseModel):
    """What POST /compare answers, in the order of `adapters`."""

    results: list[CompareResult]
