"""A sampler in 64 bits that knows which choices rounding may affect.

It returns the tokens that a sampler in 32 bits may choose: tokens that its filters may keep, given rounding and
any order of equal logits, and whose scores are so close to the best that they may be the best.
"""

import numpy as np
import numpy.typing as npt
import torch

from server.engine.sampling import MIN_TEMPERATURE, LogitsRow, noise_key

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Tokens = set[int | None]
_UNIT = 2.0**-24  # relative error of rounding to 32 bits
_MASS = 4e-5  # error of top-p's masses: sums of some ten thousand numbers
_NOISE = 20.0  # larger than any noise


def exact_noise(row: LogitsRow, vocab: int) -> Doubles:
    """Return the exact noise of each token."""
    first, second = (int(word) for word in np.frombuffer(noise_key(row), np.uint32))
    x = np.arange(vocab, dtype=np.uint64) ^ np.uint64(first)
    word = np.uint64(0xFFFFFFFF)
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & word
    x ^= np.uint64(second)
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & word
    x ^= x >> np.uint64(16)
    uniform = ((x >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
    noise: Doubles = -np.log(-np.log(uniform))
    return noise


def may_be_chosen(changed: torch.Tensor, row: LogitsRow) -> tuple[Tokens, Tokens]:
    """Return the tokens that may be chosen from logits (vocab,), fp32, after penalties and constraints.

    First with equals ordered by id, and logits ordered before scaling; then with equals in any order, including
    those whose scaled logits may round to the same.
    """
    logits: Doubles = changed.double().numpy()
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        return {None}, {None}
    params = row.params
    if params.temperature == 0:
        return {int(logits.argmax())}, {int(logits.argmax())}
    scaled = logits / max(params.temperature, MIN_TEMPERATURE)
    size = np.abs(scaled[np.isfinite(scaled)])
    near = 4 * _UNIT * float(size.max(initial=0))  # between two scaled logits
    x = scaled - scaled.max()
    scores = x + exact_noise(row, len(x))
    order = np.argsort(-x, kind="stable") if 0 < params.top_k < len(x) or params.top_p < 1 else None

    def chosen(near: float, by_ids: bool) -> Tokens:
        may, must = _left(x, order, row, near, by_ids)
        best = scores[must].max(initial=-np.inf)
        off = near + 16 * _UNIT * _NOISE
        return {int(token) for token in np.flatnonzero(may & (scores >= best - off))}

    return chosen(0.0, by_ids=True), chosen(near, by_ids=False)


def _left(
    x: Doubles, order: npt.NDArray[np.intp] | None, row: LogitsRow, near: float, by_ids: bool
) -> tuple[Bools, Bools]:
    """Return which tokens the filters may keep, and which they must. `order` is from the likeliest on."""
    params = row.params
    may, must = np.isfinite(x), np.isfinite(x)
    if order is not None:
        ordered = -x[order]  # ascending
        # For each token: how many tokens surely come before it, and how many may.
        if by_ids:
            fewest = most = np.arange(len(x))
        else:
            fewest = np.searchsorted(ordered, ordered - near, "left")
            most = np.searchsorted(ordered, ordered + near, "right") - 1
        weights = np.exp(-ordered)
        if 0 < params.top_k < len(x):
            may[order] &= fewest < params.top_k
            must[order] &= most < params.top_k
            weights[params.top_k :] = 0
        if params.top_p < 1:
            mass = np.concatenate(([0.0], weights.cumsum())) / weights.sum()
            may[order] &= mass[fewest] < params.top_p + _MASS
            must[order] &= mass[most] < params.top_p - _MASS
    if params.min_p:
        least = np.log(params.min_p)
        may &= x >= least - near - 4 * _UNIT * abs(least)
        must &= x >= least + near + 4 * _UNIT * abs(least)
    return may | (x >= -near), must
