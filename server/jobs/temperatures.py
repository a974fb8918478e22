"""Fit the temperatures of a trained version's questions to a job's held-out decisions.

The serving engine scores the options, so the probabilities are those that users will get.
"""

import ctypes
import logging
from collections.abc import Callable, Mapping

from adapters.errors import InvalidInput
from adapters.lora import AdapterRef, LoraWeights
from server.decisions.calibration import MIN_ROWS, fit_temperature
from server.engine.request import GenerationRequest, SamplingParams
from server.errors import GenerationFailed
from server.jobs.exact_match import MAX_ADAPTER_BYTES, adapter_bytes, engine_for, outputs_of
from server.model.base.weights import BaseModel
from server.training.encoding import Asked
from server.training.job_data import JobData

log = logging.getLogger("smolora.training")


def fit_temperatures(
    base: BaseModel,
    weights: LoraWeights,
    data: JobData,
    yield_or_leave: Callable[[], None],
    library: ctypes.CDLL | None = None,
) -> Mapping[str, float]:
    """Return temperatures by the digests of the questions that have at least `MIN_ROWS` held-out rows.

    `yield_or_leave` is called before each step of the engine. If `library` is given, native code computes the
    steps. If the adapter needs too much memory, return none.
    """
    limit = base.config.max_position_embeddings
    groups: dict[str, list[Asked]] = {}
    for one in data.asked:
        options = data.options.get(one.question)  # missing if the question has no training row
        if options is not None and len(one.prompt) + max(map(len, options)) <= limit:
            groups.setdefault(one.question, []).append(one)
    groups = {digest: group for digest, group in groups.items() if len(group) >= MIN_ROWS}
    if not groups or adapter_bytes(base, weights) > MAX_ADAPTER_BYTES:
        return {}
    requests = [
        GenerationRequest(
            *(f"{digest}-{number}", one.prompt, SamplingParams(max_tokens=0), (AdapterRef(weights.digest),)),
            scored_from=len(one.prompt),
            continuations=data.options[digest],
        )
        for digest, group in groups.items()
        for number, one in enumerate(group)
    ]
    try:
        scores = _scores(base, weights, requests, yield_or_leave, library)
    except (GenerationFailed, InvalidInput) as error:  # the finished job doesn't fail
        log.warning("no temperatures are fitted: %s", error)
        return {}
    found: dict[str, float] = {}
    for digest, group in groups.items():
        of_group = [scores[f"{digest}-{number}"] for number in range(len(group))]
        temperature = fit_temperature(of_group, [one.answer for one in group])
        if temperature is not None:
            found[digest] = temperature
    return found


def _scores(
    base: BaseModel,
    weights: LoraWeights,
    requests: list[GenerationRequest],
    yield_or_leave: Callable[[], None],
    library: ctypes.CDLL | None,
) -> dict[str, tuple[float, ...]]:
    """Return the scores of each request's continuations, by the request's id."""
    lengths = [len(one.prompt_token_ids) + max(map(len, one.continuations)) for one in requests]
    engine = engine_for(base, weights, lengths, library)
    try:
        outputs = outputs_of(engine, requests, yield_or_leave)
        return {output.request_id: output.scores for output in outputs if output.finish_reason is not None}
    finally:
        engine.close()
