"""Which rows are held out for validation: by content alone, so that the same rows always give the same split."""

import math
from collections.abc import Sequence
from heapq import merge
from itertools import islice

from adapters.errors import InvalidInput
from server.training.data.canonical_rows import CanonicalRows

DEFAULT_SHARE = 0.1
MIN_ROWS = 20
"""Rows from which on `DEFAULT_SHARE` is held out where the request doesn't say."""
_RUN = 4096


def default_share(num_rows: int) -> float:
    """What is held out where the request doesn't say."""
    return DEFAULT_SHARE if num_rows >= MIN_ROWS else 0.0


def hold_out(rows: CanonicalRows, share: float) -> tuple[CanonicalRows, CanonicalRows]:
    """(train, validation), both in the order given, with no row in both.

    Held out are the max(1, round(share · n)) rows with the smallest SHA-256 of their canonical JSON, and all
    duplicates of these, so that it may be a few more; a share of 0 holds out none. Raises InvalidInput on
    `validation` where that leaves no row to train on.
    """
    if not 0 <= share < 1 or not math.isfinite(share):
        raise InvalidInput.of("validation", "a share is at least 0 and below 1")
    if share == 0:
        return rows, CanonicalRows()
    digests = rows.digests()
    num_held_out = max(1, round(share * len(rows)))
    # of equal rows, all or none: whatever is as small as the last one counted
    last = nth_smallest(digests, num_held_out)
    train = rows.chosen(digest > last for digest in digests)
    if not train:
        raise InvalidInput.of("validation", "leaves no row to train on; send more rows, or a share of 0")
    return train, rows.chosen(digest <= last for digest in digests)


def nth_smallest(digests: Sequence[bytes], n: int) -> bytes:
    """The last of the `n` smallest, n at least 1; nothing where there are none."""
    # one call that sorted all of them would hold every other thread up for as long as it takes
    runs = [sorted(digests[start : start + _RUN]) for start in range(0, len(digests), _RUN)]
    return next(islice(merge(*runs), n - 1, None), b"")


def overlap(train: CanonicalRows, validation: CanonicalRows) -> int:
    """How many rows of `validation` are in `train` too."""
    known = set(train.digests())
    return sum(digest in known for digest in validation.digests())
