"""Who owns which block of the key/value cache. Plain Python; the tensors are `paged_attention`'s.

A block holds `block_size` positions of one sequence. Full blocks are known by a key that chains their tokens, the
sequence's adapter set and its project, so sequences of one project that begin alike under the same adapters share
them. A block that no sequence refers to keeps its content, and can be found again, until its room is needed: least
recently used first.

Block 0 is never handed out: it pads block tables.
"""

from collections import OrderedDict

from server.engine.sequence import Sequence


class BlockManager:
    """Allocation, sharing and eviction of blocks. `used + free == num_blocks - 1` at every moment."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError("the cache needs at least one block besides the padding block")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_freed = 0  # times that a sequence gave blocks back: until then, whoever lacked some still does
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # oldest first
        self._computing: dict[bytes, Sequence] = {}  # prompt blocks that a running sequence is about to fill

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence refers to; some still hold content that can be found."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_usable_blocks - len(self._free)

    def cached_keys(self) -> list[bytes]:
        """Of all blocks that can be found. Any thread may ask: one call copies them, under the GIL."""
        return list(self._block_of)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def num_own_blocks(self, sequence: Sequence) -> int:
        """How many blocks would come free with this sequence: those that no other one shares."""
        return sum(1 for block in sequence.block_table if self._references[block] == 1)

    def is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to fill a block that this one could share: worth a short wait."""
        for key in self._prompt_keys(sequence):
            if key not in self._block_of:
                return self._computing.get(key, sequence) is not sequence
        return False

    def admit(self, sequence: Sequence, *, num_spare_blocks: int) -> bool:
        """Give the sequence its shared prefix, if the rest of its tokens would fit and leave the spare ones free.

        Sets `block_table` and `num_computed_tokens`. At least one token is always left to compute.
        """
        assert not sequence.block_table, "admitted twice"
        shared = []
        for key in self._prompt_keys(sequence):
            block = self._block_of.get(key)
            if block is None:
                break
            shared.append(block)
        num_idle_shared = sum(1 for block in shared if not self._references[block])
        num_new = self.blocks_for(sequence.num_needed_tokens) - len(shared)
        if num_new + num_idle_shared + num_spare_blocks > len(self._free):
            return False
        for block in shared:
            self._take(block)
        sequence.block_table = shared
        sequence.num_registered_blocks = len(shared)
        sequence.num_computed_tokens = len(shared) * self.block_size
        for key in self._prompt_keys(sequence)[len(shared) :]:
            self._computing.setdefault(key, sequence)
        return True

    def reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to `num_tokens` positions; False, and nothing changed, where blocks lack."""
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
        """Take back the blocks behind what is computed, which a draft was given. They are reused first."""
        for _ in range(len(sequence.block_table) - self.blocks_for(sequence.num_computed_tokens)):
            block = sequence.block_table.pop()
            self._references[block] = 0
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def mark_computed(self, sequence: Sequence) -> None:
        """Make the sequence's newly filled blocks findable. Call after `num_computed_tokens` has moved on."""
        num_full = sequence.num_computed_tokens // self.block_size
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
        """Take all of a sequence's blocks back; its last ones are reused first."""
        for key in self._prompt_keys(sequence):
            if self._computing.get(key) is sequence:
                del self._computing[key]
        self.num_freed += bool(sequence.block_table)
        for block in reversed(sequence.block_table):
            self._references[block] -= 1
            assert self._references[block] >= 0, "a block was freed twice"
            if not self._references[block]:
                self._free[block] = None
        sequence.block_table = []
        sequence.num_registered_blocks = 0
        sequence.num_computed_tokens = 0

    def check(self, sequences: list[Sequence]) -> None:
        """Assert that the counts are exactly those of `sequences`, which are all that hold blocks."""
        counts = [0] * self.num_blocks
        for sequence in sequences:
            for block in sequence.block_table:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from the block tables"
        assert {block for block in range(1, self.num_blocks) if not counts[block]} == set(self._free)
        assert {block: key for key, block in self._block_of.items()} == self._key_of

    def _prompt_keys(self, sequence: Sequence) -> list[bytes]:
        """The keys of the full blocks that the sequence need not compute itself."""
        return sequence.full_block_keys()[: sequence.num_sharable_tokens // self.block_size]

    def _take(self, block: int) -> None:
        if not self._references[block]:
            del self._free[block]
        self._references[block] += 1
