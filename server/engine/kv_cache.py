"""Allocate the blocks of the key/value cache to sequences. Plain Python; the tensors are in `backend.PagedCache`.

A block holds `block_size` positions of one sequence. The key of a full block is a hash of its tokens, all tokens
before it, the adapter set and the project. Sequences of one project with the same adapters share the blocks of
their common prefix. A block that no sequence refers to keeps its content for later prefix cache hits. Such
blocks are reused in the order in which they were last used.

Block 0 is never allocated, because it pads block tables.
"""

from array import array
from collections import OrderedDict

from server.engine.sequence import Sequence


class BlockManager:
    """Allocation, sharing and eviction of blocks. Every block except block 0 is either used or free."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError("the cache needs at least one block besides the padding block")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_freed = 0  # times that a sequence freed blocks; until it grows, a failed admission fails again
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # oldest first
        self._computing: dict[bytes, Sequence] = {}  # keys of prompt blocks that a running sequence will fill

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """The number of blocks that no sequence refers to. The prefix cache can still find some of them."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_usable_blocks - len(self._free)

    def cached_keys(self) -> list[bytes]:
        """Return the keys of all blocks in the prefix cache. Any thread may call this: the GIL makes it atomic."""
        return list(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` positions take."""
        return -(-num_tokens // self.block_size)

    def num_own_blocks(self, sequence: Sequence) -> int:
        """Return how many blocks only this sequence uses: the blocks that its preemption would free."""
        return sum(1 for block in sequence.block_table if self._references[block] == 1)

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Return whether another running sequence will soon fill a block that this sequence could share."""
        for key in self._prompt_keys(sequence):
            if key not in self._block_of:
                return self._computing.get(key, sequence) is not sequence
        return False

    def admit(self, sequence: Sequence, *, num_spare_blocks: int) -> bool:
        """Assign a sequence the cached blocks of its prefix and return True, or return False if there is no room.

        There must be free blocks for the rest of the sequence's tokens, and `num_spare_blocks` more. Set
        `block_table` and `num_computed_tokens`. At least one token is always left to compute.
        """
        assert not sequence.block_table, "admitted twice"
        prefix = array("i")
        for key in self._prompt_keys(sequence):
            block = self._block_of.get(key)
            if block is None:
                break
            prefix.append(block)
        num_idle = sum(1 for block in prefix if not self._references[block])
        num_new = self.blocks_for(sequence.num_needed_tokens) - len(prefix)
        if num_new + num_idle + num_spare_blocks > len(self._free):
            return False
        for block in prefix:
            self._take(block)
        sequence.block_table = prefix
        sequence.num_registered_blocks = len(prefix)
        sequence.num_computed_tokens = len(prefix) * self.block_size
        for key in self._prompt_keys(sequence)[len(prefix) :]:
            self._computing.setdefault(key, sequence)
        return True

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to `num_tokens` positions. If too few blocks are free, return False instead."""
        num_new = self.blocks_for(num_tokens) - len(sequence.block_table)
        if num_new > len(self._free):
            return False
        for _ in range(num_new):
            block, _nothing = self._free.popitem(last=False)
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
            self._references[block] = 1
            sequence.block_table.append(block)
        return True

    def trim(self, sequence: Sequence) -> None:
        """Free the blocks that were reserved for a draft and have no computed tokens. They are reused first."""
        for _ in range(len(sequence.block_table) - self.blocks_for(sequence.num_computed_tokens)):
            block = sequence.block_table.pop()
            self._references[block] = 0
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def mark_computed(self, sequence: Sequence) -> None:
        """Add newly filled blocks to the prefix cache. Call this after `num_computed_tokens` has grown."""
        num_full = min(sequence.num_computed_tokens, sequence.num_lasting_tokens) // self.block_size
        if num_full <= sequence.num_registered_blocks:
            return
        keys = sequence.full_block_keys()
        for i in range(sequence.num_registered_blocks, num_full):
            key, block = keys[i], sequence.block_table[i]
            if key not in self._block_of:
                self._block_of[key] = block
                self._key_of[block] = key
            if self._computing.get(key) is sequence:
                del self._computing[key]
        sequence.num_registered_blocks = num_full

    def free(self, sequence: Sequence) -> None:
        """Free all of a sequence's blocks. Its last blocks are reused first."""
        for key in self._prompt_keys(sequence):
            if self._computing.get(key) is sequence:
                del self._computing[key]
        self.num_freed += bool(sequence.block_table)
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            assert self._references[block] >= 0, "a block was freed twice"
            if not self._references[block]:
                self._free[block] = None
        sequence.block_table = array("i")
        sequence.num_registered_blocks = 0
        sequence.num_computed_tokens = 0

    def check(self, sequences: list[Sequence]) -> None:
        """Assert that reference counts match block tables. `sequences` must be all sequences that have blocks."""
        counts = [0] * self.num_blocks
        for sequence in sequences:
            for block in sequence.block_table:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from the block tables"
        assert {block for block in range(1, self.num_blocks) if not counts[block]} == set(self._free)
        assert {block: key for key, block in self._block_of.items()} == self._key_of

    def _prompt_keys(self, sequence: Sequence) -> list[bytes]:
        """Return the keys of the full blocks that the sequence can share with other sequences."""
        return sequence.full_block_keys()[: sequence.num_sharable_tokens // self.block_size]

    def _take(self, block: int) -> None:
        if not self._references[block]:
            del self._free[block]
        self._references[block] += 1
