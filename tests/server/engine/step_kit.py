"""Requests for one step, whose rows need the same kind of work, and an engine in that state."""

from dataclasses import replace

from server.engine.engine import Engine
from server.engine.request import GenerationRequest, Grammar, SamplingParams
from tests.kits.engines import refs
from tests.server.engine.traffic import prompt

NUM_ROWS = 8
LETTERS = Grammar("regex", "[a-z ]{40}")
PLAIN = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SAMPLED = replace(PLAIN, temperature=0.8, top_p=0.9, min_p=0.01)
PENALIZED = replace(
    PLAIN, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1, logit_bias=((5, 1.0), (9, -1.0))
)
EVERYTHING = replace(PENALIZED, temperature=1.5, top_p=0.999, min_p=0.001, logprobs=5, ignore_eos=False)


def decoding(engine: Engine, requests: list[GenerationRequest]) -> None:
    """Step until every request is generating, and once more."""
    for request in requests:
        engine.check(request)
        engine.add(request)
    running = engine.scheduler.running
    while len(running) < len(requests) or not all(sequence.is_decoding for sequence in running):
        assert engine.has_work, "some requests ended before the others' adapters were loaded"
        assert not [output.error for output in engine.step() if output.error is not None]
    engine.step()


def rows(
    sampling: SamplingParams = PLAIN, *, num_parts: int = 0, grammar: Grammar | None = None
) -> list[GenerationRequest]:
    """Return NUM_ROWS requests, each with its own prompt, seed and adapters."""
    found = []
    for i in range(NUM_ROWS):
        parts = {f"{(i + part) % 16:02}": 1.0 / num_parts for part in range(num_parts)}
        found.append(
            GenerationRequest(
                f"r{i}", prompt(20 + i, seed=i), replace(sampling, seed=i), refs(**parts), grammar=grammar
            )
        )
    return found


def sharing(sampling: SamplingParams) -> list[GenerationRequest]:
    """Return the same requests under one adapter, each with another number of log-probabilities."""
    return [
        replace(
            request,
            adapters=refs(**{"00": 1.0}),
            sampling=replace(request.sampling, logprobs=i % 4, top_k=(0, 3, 300, 511)[i % 4]),
        )
        for i, request in enumerate(rows(sampling))
    ]
