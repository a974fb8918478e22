"""Sampling in native code: takes parameters, returns tokens and log-probabilities."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from server.model.native.abi import SampleRow, SampleStep, packing

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
_NO_INTS, _NO_DOUBLES = np.empty(0, np.int64), np.empty(0, np.float64)
_ROW = packing(SampleRow)


@dataclass(frozen=True, eq=False)
class Choices:
    """The next token of each row, and log-probabilities (nats) before penalties, biases and filters."""

    token_ids: Ints  # (rows,); -1 if a logit is NaN or infinite, or all tokens are forbidden
    logprobs: Floats  # (rows, 1 + n): the chosen token's, then the top ones, best first
    top_ids: Ints  # (rows, n): the likeliest tokens; -1 after the last finite logit


class SampleTable:
    """The sampling parameters of a batch, row by row."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[bytes] = []  # each a SampleRow
        self._seen: list[Ints] = []
        self._added_ids: list[Ints] = []
        self._added: list[Doubles] = []
        self._num_seen = self._num_added = 0
        self._masks: list[npt.NDArray[np.bool_]] = []  # kept, since native code reads them in place
        self._kept: tuple[object, ...] = ()  # for the same reason
        self._max_top = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        key: int,
        num_top: int,
        repetition_penalty: float = 1.0,
        seen: Ints = _NO_INTS,
        added_ids: Ints = _NO_INTS,
        added: Doubles = _NO_DOUBLES,
        forbidden: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Add a row. Temperature 0 chooses the likeliest token; else `key` (64 bits) seeds the draw.

        Logits are changed in this order: the repetition penalty is applied to `seen` tokens, `added` is added to
        the logits of `added_ids`, and tokens in the mask `forbidden` (vocab,) are excluded. Then come the filters
        top-k (0: off), top-p (1: off) and min-p (0: off). If `num_top` is positive, log-probabilities are
        returned: the chosen token's and the top `num_top`.
        """
        mask = 0
        if forbidden is not None:
            if forbidden.shape != (self._vocab_size,) or forbidden.dtype != np.bool_:
                raise ValueError(f"the mask of forbidden tokens must be {self._vocab_size} bools")
            self._masks.append(np.ascontiguousarray(forbidden))
            mask = self._masks[-1].ctypes.data
        num_top = min(num_top, self._vocab_size)
        self._max_top = max(self._max_top, num_top)
        ranges = self._num_seen, len(seen), self._num_added, len(added)
        row = temperature, top_p, min_p, top_k, key, num_top, mask, repetition_penalty, *ranges
        self._rows.append(_ROW.pack(*row))
        self._num_seen += len(seen)
        self._num_added += len(added)
        self._seen.append(seen)
        self._added_ids.append(added_ids)
        self._added.append(added)

    def step(self, *, hidden: int | None = None, logits: int | None = None) -> tuple[SampleStep, Choices]:
        """Return a step for native code, and the `Choices` that the native call will fill in.

        The step's input is at the address `hidden` or `logits`. The caller must keep this table alive until the
        call has returned.
        """
        num_rows = len(self._rows)
        rows = np.frombuffer(b"".join(self._rows), np.uint8)
        seen = np.concatenate([_NO_INTS, *self._seen])
        added_ids = np.concatenate([_NO_INTS, *self._added_ids])
        added = np.concatenate([_NO_DOUBLES, *self._added])
        choices = Choices(
            np.empty(num_rows, np.int64),
            np.empty((num_rows, 1 + self._max_top), np.float32),
            np.empty((num_rows, self._max_top), np.int64),
        )
        step = SampleStep(
            num_rows=num_rows,
            hidden=hidden,
            logits=logits,
            rows=rows.ctypes.data,
            seen=seen.ctypes.data,
            num_seen=seen.size,
            added_ids=added_ids.ctypes.data,
            added=added.ctypes.data,
            num_added=added.size,
            max_top=self._max_top,
            token_ids=choices.token_ids.ctypes.data,
            logprobs=choices.logprobs.ctypes.data,
            top_ids=choices.top_ids.ctypes.data,
        )
        self._kept = (rows, seen, added_ids, added)
        return step, choices
