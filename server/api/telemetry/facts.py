"""What the line of a request says beyond HTTP: who asked, under which adapters, for how many tokens.

`Edge` makes a `RequestFacts` for each request and leaves it where all that runs for it finds it. No text
of a prompt or an answer is among them.
"""

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from server.tracing.spans import Span

_MAX_LISTED = 16
"""Of adapters and generations in one line: as many as one /compare may have."""


@dataclass
class RequestFacts:
    """Of one request; counts are of all its generations together."""

    span: Span | None = None  # where the request is traced
    operation: str = "text_completion"  # of `gen_ai`'s
    job_id: str | None = None  # that it submitted
    generations: list[str] = field(default_factory=list)  # their ids
    adapters: dict[str, None] = field(default_factory=dict)  # name@version, in order
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of those of the prompts

    def generated(
        self, generation_id: str, adapters: Iterable[str], num_prompt: int, num_completion: int, num_cached: int
    ) -> None:
        """A generation of the request has ended, or was given up."""
        self.generations.append(generation_id)
        self.adapters.update(dict.fromkeys(adapters))
        self.prompt_tokens += num_prompt
        self.completion_tokens += num_completion
        self.cached_tokens += num_cached

    def fields(self) -> Iterator[tuple[str, str | int]]:
        """Nothing of what there wasn't."""
        if self.span is not None:
            yield "trace", self.span.trace_id
        if self.job_id is not None:
            yield "job", self.job_id
        if self.generations:
            yield "generation", _listed(self.generations)
            yield "adapters", _listed(self.adapters) or "base"
            yield "prompt_tokens", self.prompt_tokens
            yield "completion_tokens", self.completion_tokens
            yield "cached_tokens", self.cached_tokens


facts: ContextVar[RequestFacts | None] = ContextVar("facts", default=None)
"""Those of the request that is worked on; None outside of any."""


def is_chat() -> None:
    """The request that is worked on has a conversation, not a prompt."""
    if (told := facts.get()) is not None:
        told.operation = "chat"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = [f"+{len(every) - _MAX_LISTED}"] if len(every) > _MAX_LISTED else []
    return ",".join([*every[:_MAX_LISTED], *more])
