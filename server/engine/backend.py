"""The interface of backends, which compute a base model's forward pass, and the code that they share.

`torch_backend` runs on any device and is the test oracle of `native_backend`, which runs on CPUs, and of
`cuda_backend`, for NVIDIA GPUs. To support another kind of device, add one subclass of `Backend`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch

from server.engine.sampling import LogitsRow, Sampled
from server.engine.sequence import Chunk
from server.model.base.config import ModelConfig
from server.model.lora_batch import TokenRun
from server.model.rank_rows import RankRows, RowFormat

T = TypeVar("T")


class PagedCache:
    """Keys and values of every layer. Each tensor is (layers, num_blocks, block_size, kv_heads, head_dim).

    The memory is zeroed at first, so that padding has finite values. With `by_block`, the shape is (num_blocks,
    layers, ...), so a block's numbers are contiguous. On a CPU, blocks that were never written then take almost no
    memory, because the operating system provides each page of memory only when it is first written.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        by_block: bool = False,
    ) -> None:
        self.config = config
        self.block_size = block_size
        first = (num_blocks, config.num_layers) if by_block else (config.num_layers, num_blocks)
        shape = (*first, block_size, config.num_kv_heads, config.head_dim)
        self.k = _zeros(shape, dtype, device)
        self.v = _zeros(shape, dtype, device)

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * block_size * config.kv_size * dtype.itemsize


class Backend(ABC):
    """A base model's forward pass, with its key/value `cache` and the memory of resident adapters, `rows`.

    A step computes the chunks `decodes`, of one token each, and then the chunks `prefills`. Only decodes can have
    drafts (guesses of the next tokens), and only if `is_batch_invariant`.
    """

    name: ClassVar[str]
    is_batch_invariant: bool
    """Whether a token's bits depend only on the tokens before it, not on what else is in its step."""
    fallbacks: list[str]
    """What doesn't work as it should on this machine, and why, for /ready. The log has more."""
    _caches_by_block: ClassVar[bool] = False
    rows: RankRows
    cache: PagedCache

    def __init__(
        self, config: ModelConfig, row_format: RowFormat, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`row_format` says how adapters are stored, and `dtype` is the type of keys and values.

        Call `allocate` before the first step.
        """
        self.config = config
        self.row_format = row_format
        self.fallbacks = []
        self._dtype = dtype
        self._device = device

    @property
    def bytes_per_rank(self) -> int:
        """Bytes of device memory that an adapter of rank 1 takes, if it adapts all linear modules."""
        return self.row_format.bytes_per_rank(self.config.shape)

    def bytes_per_block(self, block_size: int) -> int:
        """Return the bytes of device memory for the keys and values of `block_size` positions."""
        return PagedCache.bytes_per_block(self.config, block_size, self._dtype)

    def allocate(self, num_blocks: int, block_size: int, max_rank: int) -> None:
        """Allocate the key/value cache, and memory for adapters whose ranks sum to `max_rank`.

        Each rank counts as `row_format` rounds it up.
        """
        self.rows = RankRows(self.config.shape, max_rank=max_rank, row_format=self.row_format, device=self._device)
        self.cache = PagedCache(
            self.config, num_blocks, block_size, self._dtype, self._device, by_block=self._caches_by_block
        )

    @abstractmethod
    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        """Write the chunks' keys and values to the cache, and return final hidden states (rows, hidden).

        The rows are each chunk's last `num_hidden` tokens, in the order of the chunks.
        """

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the fp32 logits (rows, vocab) of these hidden states (rows, hidden)."""

    @abstractmethod
    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        """Return the next token after each hidden state (rows, hidden). `rows` has the sampling inputs of each."""

    @abstractmethod
    def draw(self, decodes: Seq[Chunk], prefills: Seq[Chunk], rows: Seq[LogitsRow]) -> list[Sampled]:
        """Compute hidden states, and return the next token after each: `hidden` and `sample` in one call."""


class StepAdapters(Generic[T]):
    """The adapters of a step's tokens, in the form that the backend needs.

    This form is built again only if a step's adapters differ from those of the previous step.
    """

    def __init__(self, build: Callable[[Seq[TokenRun]], T]) -> None:
        self._build = build
        self._runs: list[TokenRun] = []
        self._built: T | None = None

    def of(self, chunks: Seq[Chunk]) -> T:
        runs = _token_runs(chunks)
        if self._built is None or runs != self._runs:
            self._built, self._runs = self._build(runs), runs
        return self._built


def _token_runs(chunks: Seq[Chunk]) -> list[TokenRun]:
    """Return the runs of tokens that have adapters. Neighbouring chunks with the same adapters form one run."""
    runs: list[TokenRun] = []
    start, key = 0, b""
    for chunk in chunks:
        hold = chunk.sequence.hold
        assert hold is not None
        stop = start + chunk.num_tokens
        if hold.refs and runs and chunk.sequence.adapter_key == key and runs[-1].stop == start:
            runs[-1] = TokenRun(runs[-1].start, stop, hold.parts)
        elif hold.refs:
            runs.append(TokenRun(start, stop, hold.parts))
        start, key = stop, chunk.sequence.adapter_key
    return runs


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every page. The system clears the pages of numpy's zeros when they are first used.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
