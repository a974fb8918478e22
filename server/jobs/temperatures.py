"""Fit the temperatures of a trained version's questions to a job's held-out decisions.

The serving engine scores the options, so the probabilities are those that users will get.
"""

import ctypes
import logging
from collections.abc import Callable, Mapping
from itertools import islice

from adapters.errors import InvalidInput
from adapters.lora import LoraWeights
from server.decisions.calibration import MIN_ROWS, fit_temperature
from server.errors import GenerationFailed
from server.jobs.scoring import MAX_ADAPTER_BYTES, adapter_bytes, option_scores
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
    asked = [one for group in groups.values() for one in group]
    try:
        scores = option_scores(base, ((weights, 1.0),), asked, data.options, yield_or_leave, library)
    except (GenerationFailed, InvalidInput) as error:  # the finished job doesn't fail
        log.warning("no temperatures are fitted: %s", error)
        return {}
    found: dict[str, float] = {}
    rest = iter(scores)
    for digest, group in groups.items():
        temperature = fit_temperature(list(islice(rest, len(group))), [one.answer for one in group])
        if temperature is not None:
            found[digest] = temperature
    return found
