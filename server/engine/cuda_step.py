"""One step of the cuda backend: its lists of work on the host, and its tensors on the device."""

import math
import struct
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from server.engine.sampling import MIN_TEMPERATURE, LogitsRow, noise_key
from server.engine.sequence import Chunk
from server.model.cuda.work import GroupItems, Ints, attention_work

Lora = tuple[Ints, dict[str, GroupItems]]
"""The chunks of tokens that have adapters, and each group's work: what `lora_work` returns."""


@dataclass(frozen=True, eq=False)
class StepLists:
    """The lists of work of one step, in int32 on the host, by name.

    token_ids, positions, slots and parts have an entry for each token, and `draws` has one for each row to draw.
    `needed` has the tokens whose hidden states are returned. `tables` has all sequences' pages. works, chunks
    and each group's items and ranges are what the kernels' docstrings say; num_… has the length of a list.
    """

    num_tokens: int
    num_parts: int
    has_adapters: bool
    arrays: Mapping[str, Ints]

    @property
    def draws_after_each(self) -> bool:
        """Whether one token is drawn after each of the step's tokens."""
        return len(self.arrays["needed"]) == self.num_tokens == len(self.arrays["draws"])

    @classmethod
    def of(
        cls, chunks: Seq[Chunk], rows: Seq[LogitsRow], lora: Lora | None, block_size: int, group: int
    ) -> "StepLists":
        """Return the lists of a step. `group` is how many query heads share a key head."""
        starts = np.array([chunk.start for chunk in chunks])
        lengths = np.array([chunk.num_tokens for chunk in chunks])
        num_hidden = np.array([chunk.num_hidden for chunk in chunks])
        stops = starts + lengths
        num_pages = -(-stops // block_size)
        tables = zip(chunks, num_pages.tolist(), strict=True)
        flat = np.frombuffer(b"".join(chunk.sequence.block_table[:num] for chunk, num in tables), np.int32)
        table_starts = num_pages.cumsum() - num_pages
        ends = lengths.cumsum()
        num_tokens = int(ends[-1])
        place = np.arange(num_tokens)
        offsets = place - np.repeat(ends - lengths, lengths)
        positions = np.repeat(starts, lengths) + offsets
        page = flat[np.repeat(table_starts, lengths) + positions // block_size]
        is_needed = offsets >= np.repeat(lengths - num_hidden, lengths)
        work = attention_work(starts, stops, table_starts, group)
        arrays = {
            "token_ids": np.array([i for chunk in chunks for i in chunk.token_ids]),
            "positions": positions,
            "slots": page.astype(np.int64) * block_size + positions % block_size,
            "needed": place[is_needed],
            "parts": work.parts,
            "draws": draws_of(rows),
            "tables": flat,
            "works": work.works,
            "num_tokens": np.array([num_tokens]),
            "num_works": np.array([len(work.works)]),
        }
        if lora is not None:
            all_chunks, groups = lora
            arrays |= {"chunks": all_chunks, "num_chunks": np.array([len(all_chunks)])}
            for name, one in groups.items():
                arrays[f"items {name}"] = one.items
                arrays[f"ranges {name}"] = one.ranges
                arrays[f"num_items {name}"] = np.array([len(one.items)])
        return cls(num_tokens, work.num_parts, lora is not None, arrays)


def joined(arrays: Seq[Ints], first: int = 0) -> tuple[Ints, list[int]]:
    """Return the arrays in one, from the index `first` on, and where each begins: at multiples of 16 bytes."""
    starts, end = [], -(-first // 4) * 4
    for one in arrays:
        starts.append(end)
        end += -(-one.size // 4) * 4
    words = np.zeros(end, np.int32)
    for one, start in zip(arrays, starts, strict=True):
        words[start : start + one.size] = one.ravel()
    return words, starts


class Buffers:
    """Uninitialized tensors by name. A name's memory grows if it must; until then, its address stays the same."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._flat: dict[str, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        return sum(flat.nbytes for flat in self._flat.values())

    def get(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the beginning of the name's memory in this shape."""
        size = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = torch.empty(size, dtype=dtype or self._dtype, device=self._device)
        return self._flat[name][:size].view(shape)


@dataclass(frozen=True, eq=False)
class Step:
    """One step's lists on the device by name, and the buffers that it computes in.

    The numbers bound what the lists hold, so they may be larger than a step needs: kernels read the lists' lengths
    on the device.
    """

    num_tokens: int
    num_parts: int
    num_works: int
    num_items: Mapping[str, int]  # of each group
    has_adapters: bool
    lists: Mapping[str, torch.Tensor]
    buffers: Buffers


def upload(words: Ints, to: torch.Tensor) -> None:
    """Copy the words to the beginning of a tensor, without waiting."""
    host = torch.from_numpy(words)
    to[: len(words)].copy_(host if to.device.type == "cpu" else host.pin_memory(), non_blocking=True)


def step_of(lists: StepLists, buffers: Buffers) -> Step:
    """Return a step of exactly these lists, after one upload."""
    words, starts = joined(list(lists.arrays.values()))
    sent = buffers.get("lists", len(words), dtype=torch.int32)
    upload(words, sent)
    on_device = {
        name: sent[start : start + one.size].view(one.shape)
        for (name, one), start in zip(lists.arrays.items(), starts, strict=True)
    }
    prefix = "items "
    return Step(
        num_tokens=lists.num_tokens,
        num_parts=lists.num_parts,
        num_works=len(lists.arrays["works"]),
        num_items={name[len(prefix) :]: len(one) for name, one in on_device.items() if name.startswith(prefix)},
        has_adapters=lists.has_adapters,
        lists=on_device,
        buffers=buffers,
    )


def draws_of(rows: Seq[LogitsRow]) -> Ints:
    """Return three words for each row: the bits of its temperature, and the two words of its noise key."""
    packed = b"".join(
        struct.pack("<f", max(row.params.temperature, MIN_TEMPERATURE)) + noise_key(row)
        if row.params.temperature > 0
        else bytes(12)
        for row in rows
    )
    return np.frombuffer(bytearray(packed), np.int32).reshape(-1, 3)
