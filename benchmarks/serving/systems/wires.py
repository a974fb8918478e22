"""How a request is spelled for a server over HTTP, and what its streamed events say: ours and llama.cpp's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast


@dataclass(frozen=True)
class Part:
    """An adapter of a request, and its weight."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Request:
    """A request for exactly `max_tokens` tokens, greedy unless it has a temperature."""

    prompt: str
    parts: tuple[Part, ...]  # none: the base
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    logprobs: int = 0


@dataclass(frozen=True)
class Usage:
    """What a stream's last event tells."""

    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_seconds: float = 0.0  # as the server says, where it does


class Wire(Protocol):
    """A server's way to be asked."""

    @property
    def path(self) -> str: ...
    def body(self, request: Request) -> dict[str, object]:
        """Of a streamed request."""
        ...

    def read(self, event: Mapping[str, object]) -> str | Usage:
        """A piece of text, which is a token but for a few, or the end."""
        ...


class Smolora:
    """Ours: POST /generate."""

    path = "/generate"

    def body(self, request: Request) -> dict[str, object]:
        return {
            "prompt": request.prompt,
            "adapter": expression(request.parts),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "logprobs": request.logprobs,
            "ignore_eos": True,
            "speculation": "off",  # answers past their end repeat themselves, which peers don't profit from
            "stream": True,
        }

    def read(self, event: Mapping[str, object]) -> str | Usage:
        if "finish_reason" not in event:
            return cast(str, event["text"])
        usage = cast("Mapping[str, int]", event["usage"])
        timing = cast("Mapping[str, float]", event["timing"])
        counts = (usage["completion_tokens"], usage["prompt_tokens"], usage["cached_tokens"])
        return Usage(*counts, timing["queue_ms"] / 1e3)


class LlamaCpp:
    """llama.cpp's server: POST /completion, each adapter with a scale of its own."""

    path = "/completion"

    def __init__(self, adapters: Sequence[str]) -> None:
        """`adapters` in the order in which the server was given them."""
        self._ids = {name: number for number, name in enumerate(adapters)}

    def body(self, request: Request) -> dict[str, object]:
        assert not request.temperature, "only greedy requests are compared"
        return {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],  # the others would cost it time and change nothing
            "ignore_eos": True,
            "lora": [{"id": number, "scale": scale} for number, scale in self._scales(request.parts).items()],
            "stream": True,
        }

    def _scales(self, parts: Sequence[Part]) -> dict[int, float]:
        """By adapter; those that aren't named have none, but where none is named all are applied in full."""
        named = {self._ids[part.name]: part.weight for part in parts}
        return named or dict.fromkeys(list(self._ids.values())[:1], 0.0)

    def read(self, event: Mapping[str, object]) -> str | Usage:
        if not event["stop"]:
            return cast(str, event["content"])
        timings = cast("Mapping[str, int]", event["timings"])
        counts = (cast(int, event["tokens_predicted"]), cast(int, event["tokens_evaluated"]))
        return Usage(*counts, timings["cache_n"])


def expression(parts: Sequence[Part]) -> str | None:
    """As our API spells it; None for the base."""
    return "+".join(part.name if part.weight == 1 else f"{part.name}*{part.weight:g}" for part in parts) or None
