"""What computes: how a backend stores keys, values and adapters, and its forward over them.

The engine knows a backend by this protocol alone. A backend that is written in another way (for a GPU, say) is one
more class here, with a forward in `forwards.py`.
"""

from typing import Protocol

import torch

from server.engine.forwards import Forward, NativeForward, TorchForward
from server.engine.paged_attention import PagedCache
from server.model.base.config import ModelConfig
from server.model.native.model import ROW_FORMAT, NativeModel
from server.model.rank_rows import RankRows, RowFormat
from server.model.smollm import SmolLM


class Backend(Protocol):
    """A base's forward with its stores."""

    @property
    def config(self) -> ModelConfig:
        """The base's."""
        ...

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a token's bits depend on those before it alone, not on how many are computed with it: what
        drafted tokens need to change nothing."""
        ...

    @property
    def row_format(self) -> RowFormat:
        """How it stores adapters."""
        ...

    @property
    def bytes_per_rank(self) -> int:
        """Of the device's memory, for one rank on all linear modules."""
        ...

    def bytes_per_block(self, block_size: int) -> int:
        """Of the device's memory, for so many positions' keys and values."""
        ...

    def rank_rows(self, max_rank: int) -> RankRows:
        """Room for adapters whose ranks, rounded as the rows want it, add up to `max_rank`."""
        ...

    def forward(self, num_blocks: int, block_size: int, rows: RankRows) -> Forward:
        """Over a new cache of `num_blocks` blocks, and these rows."""
        ...


class TorchBackend:
    """`SmolLM` on any device: the oracle of the others."""

    is_batch_invariant = False  # torch's products round one way for a row, another for several

    def __init__(self, model: SmolLM) -> None:
        self.config = model.config
        self._model = model
        self.row_format = RowFormat.of_torch(model.dtype, model.device)

    @property
    def bytes_per_rank(self) -> int:
        return self.row_format.bytes_per_rank(self.config.shape)

    def bytes_per_block(self, block_size: int) -> int:
        return PagedCache.bytes_per_block(self.config, block_size, self._model.dtype)

    def rank_rows(self, max_rank: int) -> RankRows:
        return RankRows(
            self.config.shape, max_rank=max_rank, row_format=self.row_format, device=self._model.device
        )

    def forward(self, num_blocks: int, block_size: int, rows: RankRows) -> Forward:
        cache = PagedCache(self.config, num_blocks, block_size, self._model.dtype, self._model.device)
        return TorchForward(self._model, cache, rows)


class NativeBackend:
    """A CPU's native code, in bf16."""

    is_batch_invariant = True
    row_format = ROW_FORMAT

    def __init__(self, model: NativeModel) -> None:
        self.config = model.config
        self._model = model

    @property
    def bytes_per_rank(self) -> int:
        return ROW_FORMAT.bytes_per_rank(self.config.shape)

    def bytes_per_block(self, block_size: int) -> int:
        return PagedCache.bytes_per_block(self.config, block_size, torch.bfloat16)

    def rank_rows(self, max_rank: int) -> RankRows:
        return RankRows(self.config.shape, max_rank=max_rank, row_format=ROW_FORMAT, device=torch.device("cpu"))

    def forward(self, num_blocks: int, block_size: int, rows: RankRows) -> Forward:
        device = torch.device("cpu")
        cache = PagedCache(self.config, num_blocks, block_size, torch.bfloat16, device, by_block=True)
        return NativeForward(self._model, cache, rows)
