"""Wire formats of requests and streamed events: our server's, llama.cpp's and OpenAI's."""

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
    parts: tuple[Part, ...]  # empty: the base
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    logprobs: int = 0


@dataclass(frozen=True)
class Usage:
    """Usage reported by a stream's last event."""

    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    queue_seconds: float = 0.0  # as reported by the server; 0 if it doesn't


class Wire(Protocol):
    """A server's format of requests and events."""

    @property
    def path(self) -> str: ...
    def body(self, request: Request) -> dict[str, object]:
        """Return the body of a streamed request."""
        ...

    def read(self, event: Mapping[str, object]) -> str | Usage:
        """Return a piece of text, nearly always one token, or the usage at the end."""
        ...


class Smolora:
    """The format of our POST /generate."""

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
            "speculation": "off",  # answers past their end repeat themselves, which would favour us over peers
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
    """The format of llama.cpp's POST /completion, where each adapter has a scale."""

    path = "/completion"

    def __init__(self, adapters: Sequence[str]) -> None:
        """Number the adapters in the order of the server's flags."""
        self._ids = {name: number for number, name in enumerate(adapters)}

    def body(self, request: Request) -> dict[str, object]:
        assert not request.temperature, "only greedy requests are compared"
        return {
            "prompt": request.prompt,
            "n_predict": request.max_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],  # other samplers would cost it time without effect
            "ignore_eos": True,
            "lora": [{"id": number, "scale": scale} for number, scale in self._scales(request.parts).items()],
            "stream": True,
        }

    def _scales(self, parts: Sequence[Part]) -> dict[int, float]:
        """Return scales by adapter. If no adapter is named, one scale of 0 is sent: llama.cpp applies all of them
        otherwise."""
        named = {self._ids[part.name]: part.weight for part in parts}
        return named or dict.fromkeys(list(self._ids.values())[:1], 0.0)

    def read(self, event: Mapping[str, object]) -> str | Usage:
        if not event["stop"]:
            return cast(str, event["content"])
        timings = cast("Mapping[str, int]", event["timings"])
        counts = (cast(int, event["tokens_predicted"]), cast(int, event["tokens_evaluated"]))
        return Usage(*counts, timings["cache_n"])


class OpenAiCompletions:
    """The format of OpenAI's POST /v1/completions as vLLM has it: an adapter is named as the model."""

    path = "/v1/completions"

    def __init__(self, base: str) -> None:
        self._base = base

    def body(self, request: Request) -> dict[str, object]:
        assert len(request.parts) <= 1, "it has no blends"
        return {
            "model": request.parts[0].name if request.parts else self._base,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, event: Mapping[str, object]) -> str | Usage:
        if choices := cast("Sequence[Mapping[str, str]]", event["choices"]):
            return choices[0]["text"]
        usage = cast("Mapping[str, int]", event["usage"])
        return Usage(usage["completion_tokens"], usage["prompt_tokens"], 0)


def expression(parts: Sequence[Part]) -> str | None:
    """Return the adapters as our API's expression, or None for the base."""
    return "+".join(part.name if part.weight == 1 else f"{part.name}*{part.weight:g}" for part in parts) or None
