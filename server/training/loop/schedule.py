"""The learning rate of each optimizer step."""

import math

from server.training.spec import Schedule


def learning_rate(step: int, total_steps: int, peak: float, schedule: Schedule, warmup_ratio: float) -> float:
    """The rate of optimizer step `step`, counted from 0, of `total_steps`.

    It rises linearly to `peak` over the warm-up, ceil(warmup_ratio · total_steps) steps, the first of which is
    already above 0; then it stays (constant), falls in a straight line, or by half a cosine (Loshchilov & Hutter
    2017, arXiv:1608.03983), to 0 at the end of the last step.
    """
    num_warmup = math.ceil(warmup_ratio * total_steps - 1e-9)  # in binary, 0.07 · 100 lies above 7
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, total_steps - num_warmup)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * (1 + math.cos(math.pi * done)) / 2
