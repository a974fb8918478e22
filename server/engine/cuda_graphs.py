"""Steps of a few fixed sizes as CUDA graphs, so that the host launches a step in one call.

A graph repeats launches with the same addresses and grids. So its lists of work have fixed places, its tensors
never grow, and the kernels read the lists' lengths on the device: two graphs of a size, with and without adapters,
serve any mix of ranks, blends and lengths. A step takes the smallest size that holds its tokens. The other tokens
are padding: they have no work, and write their keys and values to block 0, which no sequence owns.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.cuda_step import Buffers, Step, StepLists, joined, upload
from server.model.base.config import ModelConfig
from server.model.cuda import attention, lora
from server.model.cuda.lists import HEADER
from server.model.cuda.work import Ints
from server.model.rank_rows import GROUPS

SIZES = (1, 2, 4, 8, *range(16, 64, 16), *range(64, 257, 32))
"""The numbers of tokens for which there are graphs."""
MAX_BYTES = 512 << 20
"""The most memory of all graphs' tensors together, which they share. Larger sizes have no graphs."""
ITEMS_PER_TOKEN = 8
"""Work items of one module for which a graph has room: 8 tiles are a total rank of 128 for every sequence."""

Outputs = tuple[torch.Tensor, torch.Tensor]
"""Logits (tokens, vocab) and drawn tokens (tokens,)."""
Compute = Callable[[torch.Tensor, torch.Tensor, int, Step], Outputs]
"""Launches a step of `lists`, which it copies from the upload `packed`, with that number of lists."""
Capture = Callable[[Callable[[], object]], Callable[[], object]]
"""Returns a function that repeats the launches of the given function, which it calls once."""


def capture_on_gpu(device: torch.device) -> Capture:
    """Return CUDA's own capture. All graphs share one pool of memory, since they run one after the other."""
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()

    def capture(work: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            work()
        return graph.replay

    return capture


@dataclass(frozen=True)
class GraphSizes:
    """The shapes of graphs' tensors: room for `num_tokens` tokens, of sequences of up to `max_positions`."""

    config: ModelConfig
    num_tokens: int
    max_positions: int
    block_size: int

    @classmethod
    def fitting(
        cls, config: ModelConfig, itemsize: int, max_num_seqs: int, max_positions: int, block_size: int
    ) -> "GraphSizes | None":
        """Return the shapes for a step of each sequence's next token, or for as many as MAX_BYTES allow."""
        needed = min((size for size in SIZES if size >= max_num_seqs), default=SIZES[-1])
        for size in reversed(SIZES):
            found = cls(config, size, max_positions, block_size)
            if size <= needed and found.num_bytes(itemsize) <= MAX_BYTES:
                return found
        return None

    @property
    def num_splits(self) -> int:
        """Attention's parts of one token at most."""
        return -(-self.max_positions // attention.SPLIT)

    @property
    def num_items(self) -> dict[str, int]:
        """Each group's work items at most."""
        return {name: self.num_tokens * len(modules) * ITEMS_PER_TOKEN for name, modules in GROUPS.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the lists (`StepLists`) by name."""
        num = self.num_tokens
        shapes: dict[str, tuple[int, ...]] = {
            "token_ids": (num,),
            "positions": (num,),
            "slots": (num,),
            "parts": (num, 2),
            "draws": (num, 3),
            "tables": (num * -(-self.max_positions // self.block_size),),
            "works": (num * self.num_splits, attention.FIELDS),
            "num_tokens": (1,),
            "num_works": (1,),
            "chunks": (num, 2),
            "num_chunks": (1,),
        }
        for name, modules in GROUPS.items():
            shapes[f"items {name}"] = (self.num_items[name], lora.FIELDS)
            shapes[f"ranges {name}"] = (num, len(modules) + 1)
            shapes[f"num_items {name}"] = (1,)
        return shapes

    @property
    def num_words(self) -> int:
        """The words of all lists."""
        return sum(-(-int(np.prod(shape)) // 4) * 4 for shape in self.shapes.values())

    def num_bytes(self, itemsize: int) -> int:
        """Return the bytes of all graphs' tensors, for a base whose numbers have `itemsize` bytes."""
        config, num = self.config, self.num_tokens
        rows = 2 * config.hidden_size + 2 * config.q_size + (config.q_size + 2 * config.kv_size)
        rows += 3 * config.intermediate_size
        parts = num * self.num_splits * config.num_heads * (config.head_dim + 1)
        items = max(self.num_items.values()) * lora.TILE * lora.TILE
        words = 2 * self.num_words + _header_words(self.shapes) + num * config.vocab_size + num
        return itemsize * (num * rows + items) + 4 * (parts + words)


_BY_TOKEN = frozenset({"token_ids", "positions", "slots", "parts", "draws"})
"""Lists with an entry for each token, whose padding is zero: token 0 at position 0, without parts, in slot 0."""
_OF_ADAPTERS = ("chunks", "num_chunks", "items ", "ranges ", "num_items ")


def _header_words(names: Mapping[str, object]) -> int:
    return -(-HEADER * len(names) // 4) * 4


@dataclass(frozen=True, eq=False)
class _Graph:
    replay: Callable[[], object]
    outputs: Outputs


class Graphs:
    """The graphs of all sizes, with the memory that they share."""

    def __init__(
        self, sizes: GraphSizes, dtype: torch.dtype, device: torch.device, compute: Compute, capture: Capture
    ) -> None:
        """Capture every graph, the largest first, so that no later one needs more memory."""
        self._sizes = sizes
        self._places: dict[str, int] = {}
        end = 0
        for name, shape in sizes.shapes.items():
            self._places[name] = end
            end += -(-int(np.prod(shape)) // 4) * 4
        self._lists = torch.zeros(end, dtype=torch.int32, device=device)
        self._packed = torch.zeros(end + _header_words(self._places), dtype=torch.int32, device=device)
        self.buffers = Buffers(dtype, device)
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        for size in (size for size in reversed(SIZES) if size <= sizes.num_tokens):
            for has_adapters in (True, False):
                step, num_lists = self._step(size, has_adapters), len(list(self._names(has_adapters)))

                def work(step: Step = step, num_lists: int = num_lists) -> Outputs:
                    return compute(self._packed, self._lists, num_lists, step)

                outputs = work()  # kernels are compiled and loaded, and memory is allocated, before the capture
                self._graphs[size, has_adapters] = _Graph(capture(work), outputs)

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory."""
        return self.buffers.num_bytes + self._lists.nbytes + self._packed.nbytes

    def run(self, lists: StepLists) -> Outputs | None:
        """Compute a step, and return its outputs, which the next step overwrites. Return None if no graph fits."""
        size = next((size for size in SIZES if size >= lists.num_tokens), None)
        graph = None if size is None else self._graphs.get((size, lists.has_adapters))
        if graph is None or size is None or not lists.draws_after_each or not self._has_room(lists):
            return None
        upload(self._words(lists, size), self._packed)
        graph.replay()
        logits, tokens = graph.outputs
        return logits[: lists.num_tokens], tokens[: lists.num_tokens]

    def _has_room(self, lists: StepLists) -> bool:
        shapes = self._sizes.shapes
        return all(len(lists.arrays[name]) <= shapes[name][0] for name in self._names(lists.has_adapters))

    def _words(self, lists: StepLists, size: int) -> Ints:
        """Return what to upload: the header and the lists. Lists by token are padded to `size`."""
        arrays = []
        for name in self._names(lists.has_adapters):
            one = lists.arrays[name]
            if name in _BY_TOKEN and len(one) < size:
                padded = np.zeros((size, *one.shape[1:]), np.int32)
                padded[: len(one)] = one
                one = padded
            arrays.append(one)
        words, starts = joined(arrays, HEADER * len(arrays))
        places = [self._places[name] for name in self._names(lists.has_adapters)]
        header = np.array([starts, [one.size for one in arrays], places], np.int32)
        words[: header.size] = header.T.ravel()
        return words

    def _names(self, has_adapters: bool) -> Iterator[str]:
        return (name for name in self._places if has_adapters or not name.startswith(_OF_ADAPTERS))

    def _step(self, size: int, has_adapters: bool) -> Step:
        sizes, views = self._sizes, {}
        for name in self._names(has_adapters):
            shape = sizes.shapes[name]
            view = self._lists[self._places[name] :][: int(np.prod(shape))].view(shape)
            views[name] = view[:size] if name in _BY_TOKEN else view
        return Step(
            num_tokens=size,
            num_parts=size * sizes.num_splits,
            num_works=size * sizes.num_splits,
            num_items=sizes.num_items if has_adapters else {},
            has_adapters=has_adapters,
            lists=views,
            buffers=self.buffers,
        )
