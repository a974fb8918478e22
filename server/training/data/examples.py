"""Tokenized rows: compact in memory, and in one file that a training job reads back.

A file is safetensors of three flat tensors: `token_ids` int32 and `is_target` uint8, one entry for each token, and
`offsets` int64, where each row starts and the last one ends.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from adapters.durable import new_file


@dataclass(frozen=True)
class Example:
    """One row's tokens. Where is_target[i], token i is trained on, given those before it; never the first."""

    token_ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.is_target), "a flag for each token"
        assert not any(self.is_target[:1]), "nothing predicts the first token"


class Examples(Sequence[Example]):
    """Many examples in 5 bytes a token; each is made when it is asked for."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._token_ids = array("i")
        self._is_target = array("B")
        self._offsets = array("q", [0])
        for example in examples:
            self.append(example)

    def append(self, example: Example) -> None:
        """Add one at the end."""
        self._token_ids.extend(example.token_ids)
        self._is_target.extend(example.is_target)
        self._offsets.append(len(self._token_ids))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [end - start for start, end in zip(self._offsets, self._offsets[1:], strict=False)]

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on."""
        # array's own `count` makes an int of each, and holds the interpreter for as long as that takes
        return int(np.count_nonzero(np.asarray(self._is_target).view(np.bool_)))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # IndexError where there is none
        span = slice(self._offsets[place], self._offsets[place + 1])
        return Example(tuple(self._token_ids[span]), tuple(map(bool, self._is_target[span])))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "token_ids": np.array(self._token_ids, np.int32),
            "is_target": np.array(self._is_target, np.uint8),
            "offsets": np.array(self._offsets, np.int64),
        }
        with new_file(path) as unfinished:
            save_file(tensors, unfinished)

    @classmethod
    def load(cls, path: Path) -> "Examples":
        """What `save` wrote. Raises OSError, or SafetensorError where the file is damaged."""
        tensors = load_file(path)
        examples = cls()
        examples._token_ids = array("i", tensors["token_ids"].tobytes())
        examples._is_target = array("B", tensors["is_target"].tobytes())
        examples._offsets = array("q", tensors["offsets"].tobytes())
        return examples


def save_examples(path: Path, examples: Iterable[Example]) -> None:
    """As `Examples.save`."""
    (examples if isinstance(examples, Examples) else Examples(examples)).save(path)


def load_examples(path: Path) -> Examples:
    """As `Examples.load`."""
    return Examples.load(path)
