"""Serving steps that would read or write out of bounds: each kind is refused, and the next step runs."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
import torch

from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.lora_batch import TokenRun
from server.model.native.abi import LoraModule, LoraPart, call, columns
from server.model.native.model import ROW_FORMAT, NativeLora, NativeModel, StepTables
from server.model.native.sampling import SampleTable
from server.model.rank_rows import RankRows, RowFormat
from tests.kits.engines import place, random_adapter
from tests.kits.native import SHAPES, native_library
from tests.kits.tiny import save_tiny_base

MAX_POSITIONS = 64
NUM_BLOCKS, BLOCK_SIZE = 6, 16


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return native_library()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    architecture, options = SHAPES["grouped"]
    directory = save_tiny_base(tmp_path_factory.mktemp("refusals") / "tiny", architecture, options, seed=3)
    return load_base(resolve_base(str(directory), directory.parent), torch.bfloat16)


@pytest.fixture(scope="module")
def model(base: BaseModel, library: ctypes.CDLL) -> NativeModel:
    return NativeModel(library, base.config, base.weights, max_positions=MAX_POSITIONS, num_threads=2)


@dataclass
class Step:
    """A prompt of 20 tokens with an adapter, and a token at position 17 of another sequence."""

    base: BaseModel
    rows: RankRows
    token_ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.arange(21, dtype=np.int64))
    runs: npt.NDArray[np.int64] = field(
        default_factory=lambda: np.array([(0, 20, 0, 0, 20), (20, 21, 17, 2, 1)], np.int64)
    )
    blocks: npt.NDArray[np.int32] = field(default_factory=lambda: np.array([5, 0, 3, 4], np.int32))
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)
    lora: NativeLora = field(init=False)

    def __post_init__(self) -> None:
        config = self.base.config
        shape = (NUM_BLOCKS, config.num_layers, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
        adapter = random_adapter(config.shape, 0, rank=4, dtype=torch.bfloat16)
        placement = place(self.rows, [adapter])[0]
        self.lora = NativeLora(self.rows, [TokenRun(0, 20, ((placement, 1.0),))])

    @classmethod
    def of(cls, base: BaseModel) -> "Step":
        rows = RankRows(base.config.shape, max_rank=8, row_format=ROW_FORMAT, device=torch.device("cpu"))
        return cls(base, rows)

    def run(self, model: NativeModel) -> torch.Tensor:
        return model.forward(self.tables)

    @property
    def tables(self) -> StepTables:
        return StepTables(self.token_ids, self.runs, self.blocks, self.k, self.v, self.lora)

    def table(self, structure: type[ctypes.Structure], group: int = 0) -> npt.NDArray[np.int64]:
        """Return the parts of a group, or all modules, as the native code reads them."""
        if structure is LoraModule:
            return self.lora.modules
        pool = self.lora.pools[group]
        pointer = ctypes.cast(pool.parts, ctypes.POINTER(ctypes.c_int64))
        return np.ctypeslib.as_array(pointer, (len(self.lora.weights), columns(structure)))


def ids(value: int) -> Callable[[Step], None]:
    def change(step: Step) -> None:
        step.token_ids[3] = value

    return change


def run_field(run: int, column: int, value: int) -> Callable[[Step], None]:
    def change(step: Step) -> None:
        step.runs[run, column] = value

    return change


def block(index: int, value: int) -> Callable[[Step], None]:
    def change(step: Step) -> None:
        step.blocks[index] = value

    return change


def segment(column: int, value: int) -> Callable[[Step], None]:
    def change(step: Step) -> None:
        step.lora.segments[0, column] = value

    return change


def part(column: int, value: int) -> Callable[[Step], None]:
    def change(step: Step) -> None:
        step.table(LoraPart, 1)[0, column] = value

    return change


def module(column: int, value: int) -> Callable[[Step], None]:
    def change(step: Step) -> None:
        step.table(LoraModule)[1, column] = value

    return change


def set_to(name: str, make: Callable[[Step], object]) -> Callable[[Step], None]:
    return lambda step: setattr(step, name, make(step))


def wrong_pool(step: Step) -> None:
    step.lora.pools[2].layers -= 1


SERVING: dict[str, tuple[Callable[[Step], None], str]] = {
    "an id that is too large": (ids(512), "token id 512 is not one of the vocabulary of 512"),
    "an id below zero": (ids(-1), "token id -1"),
    "a run before the tokens": (run_field(0, 0, -1), r"run 0 has the tokens \[-1, 20\)"),
    "a run behind the tokens": (run_field(1, 1, 22), r"run 1 has the tokens \[20, 22\) of 21"),
    "a run of nothing": (run_field(1, 1, 20), r"run 1 has the tokens \[20, 20\)"),
    "a token in no run": (run_field(1, 0, 19), r"run 1 has the tokens \[19, 21\) of 21, after 20"),
    "too few runs": (set_to("runs", lambda step: step.runs[:1].copy()), "runs of 20 tokens for 21"),
    "no runs": (set_to("runs", lambda step: step.runs[:0].copy()), "runs of 0 tokens for 21"),
    "a position below zero": (run_field(1, 2, -1), "run 1 has 1 tokens from position -1 on, of 64"),
    "a position without angles": (run_field(1, 2, 64), "run 1 has 1 tokens from position 64 on, of 64"),
    "a position far away": (run_field(1, 2, 2**62), "run 1 has 1 tokens from position"),
    "a table before the tables": (run_field(0, 3, -1), "run 0 needs 2 blocks from -1 on, of a table of 4"),
    "a table behind the tables": (run_field(1, 3, 3), "run 1 needs 2 blocks from 3 on, of a table of 4"),
    "no tables": (
        set_to("blocks", lambda step: step.blocks[:0].copy()),
        "needs 2 blocks from 0 on, of a table of 0",
    ),
    "a block that is too large": (block(1, NUM_BLOCKS), "block 6 of run 0 is not one of the cache's 6"),
    "a block below zero": (block(3, -1), "block -1 of run 1"),
    "fewer hidden states than none": (run_field(0, 4, -1), "run 0 wants the hidden states of -1 of its 20 tokens"),
    "hidden states of more tokens": (run_field(1, 4, 2), "run 1 wants the hidden states of 2 of its 1 tokens"),
    "far too many hidden states": (run_field(0, 4, 2**62), "run 0 wants the hidden states of"),
    "no tokens": (set_to("token_ids", lambda step: step.token_ids[:0].copy()), "a step of 0 tokens"),
    "ids of 32 bits": (set_to("token_ids", lambda step: step.token_ids.astype(np.int32)), "must be int64"),
    "runs of 32 bits": (set_to("runs", lambda step: step.runs.astype(np.int32)), "must be int64"),
    "blocks of 64 bits": (set_to("blocks", lambda step: step.blocks.astype(np.int64)), "blocks int32"),
    "runs of three numbers": (set_to("runs", lambda step: step.runs[:, :3].copy()), "runs must have 5 numbers"),
    "a cache of fewer layers": (set_to("k", lambda step: step.k[:, 1:].contiguous()), "a cache must be bf16"),
    "a cache of other heads": (set_to("v", lambda step: step.v[:, :, :, :1].contiguous()), "a cache must be bf16"),
    "a cache in fp32": (set_to("k", lambda step: step.k.float()), "a cache must be bf16"),
    "a cache that is a view": (set_to("k", lambda step: step.k[::2]), "a cache must be bf16, contiguous"),
    "caches of two sizes": (
        set_to("v", lambda step: step.v[1:].contiguous()),
        "must have one shape",
    ),
    "a segment behind the tokens": (segment(1, 22), r"segment 0 has the tokens \[0, 22\) of 21"),
    "a segment before the tokens": (segment(0, -1), r"segment 0 has the tokens \[-1, 20\)"),
    "a segment the wrong way round": (segment(1, -1), r"segment 0 has the tokens \[0, -1\)"),
    "a segment of other parts": (segment(2, 1), "segment 0 has 1 parts from 1 on, of 1"),
    "a segment of more parts": (segment(3, 2), "segment 0 has 2 parts from 0 on, of 1"),
    "rows before the pool's": (part(0, -1), "part 0 of group 1 has 4 rows from -1 on, of 8"),
    "rows behind the pool's": (part(0, 5), "part 0 of group 1 has 4 rows from 5 on, of 8"),
    "fewer rows than none": (part(1, -1), "part 0 of group 1 has -1 rows"),
    "fewer rows than a module's": (part(1, 3), "module 3 has 4 rows from 0 on, of 3"),
    "modules before the table's": (part(2, -1), "part 0 of group 1 has 1 modules from -1 on, of 7"),
    "more modules than the table's": (part(3, 5), "part 0 of group 1 has 5 modules from 3 on, of 7"),
    "B's numbers behind the pool's": (part(4, 2**40), "part 0 of group 1 has 384 numbers of B from 1099511627776"),
    "fewer numbers of B than none": (part(5, -1), "part 0 of group 1 has -1 numbers of B"),
    "fewer numbers of B than a module's": (part(5, 8), "module 3 begins at 0 of its part's 8 numbers of B"),
    "a rank that is too large": (module(0, 9), "module 1 has 9 rows from 4 on, of 12"),
    "a rank that is odd": (module(0, 3), "module 1 has 3 rows: they come in pairs"),
    "a rank below zero": (module(0, -1), "module 1 has -1 rows"),
    "a module's row": (module(1, 9), "module 1 has 4 rows from 9 on, of 12"),
    "B behind the pool's": (module(2, 2**40), "module 1 begins at 1099511627776 of its part's"),
    "B before the pool's": (module(2, -1), "module 1 begins at -1 of its part's"),
    "outputs behind the group's": (module(3, 320), "module 1 has 64 outputs from 320 on, of 320"),
    "outputs within a tile": (module(3, 8), "module 1 has 64 outputs from 8 on"),
    "half a tile of outputs": (module(4, 40), "module 1 has 40 outputs"),
    "another base's pool": (wrong_pool, "group 2 has rows of 96 numbers in 2 layers"),
}


@pytest.mark.parametrize("kind", SERVING)
def test_a_step_of_serving(base: BaseModel, model: NativeModel, kind: str) -> None:
    change, reason = SERVING[kind]
    expected = Step.of(base).run(model)
    step = Step.of(base)
    change(step)
    with pytest.raises(ValueError, match=reason):
        step.run(model)
    assert torch.equal(Step.of(base).run(model), expected)


def test_rows_for_other_tokens_than_are_wanted(base: BaseModel, model: NativeModel) -> None:
    def table(num_rows: int) -> SampleTable:
        greedy = SampleTable(base.config.vocab_size)
        for _ in range(num_rows):
            greedy.add(temperature=0, top_k=0, top_p=1, min_p=0, key=0, num_top=2)
        return greedy

    expected = model.sample(Step.of(base).run(model), table(21))
    for wrong in (0, 20, 22):
        with pytest.raises(ValueError, match=f"{wrong} rows for 21 hidden states"):
            model.draw(Step.of(base).tables, table(wrong))
    found = model.draw(Step.of(base).tables, table(21))
    for name in ("token_ids", "logprobs", "top_ids"):
        assert (getattr(found, name) == getattr(expected, name)).all()


def test_rank_rows_that_are_laid_out_for_torch(base: BaseModel) -> None:
    cpu = torch.device("cpu")
    in_torch = RowFormat.of_torch(torch.bfloat16, cpu)
    rows = RankRows(base.config.shape, max_rank=8, row_format=in_torch, device=cpu)
    with pytest.raises(ValueError, match="ROW_FORMAT"):
        NativeLora(rows, [])


def test_hidden_states_of_other_shapes(base: BaseModel, model: NativeModel) -> None:
    hidden = Step.of(base).run(model)
    assert model.logits(hidden[:0]).shape == (0, base.config.vocab_size)
    for wrong in (hidden.float(), hidden[0], hidden[:, :64]):
        with pytest.raises(ValueError, match="hidden states must be bf16"):
            model.logits(wrong)


def test_threads_that_the_team_does_not_have(base: BaseModel, model: NativeModel) -> None:
    for wrong in (-1, 3):
        step = model._step(Step.of(base).tables)
        step.num_threads = wrong
        with pytest.raises(ValueError, match=f"a step of {wrong} threads"):
            call(model._library.smolora_forward, model._model, ctypes.addressof(step))
