"""The times of the phases of native steps add up to the steps, for serving and training."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.native.abi import PHASES, TRAIN_PHASES
from server.model.native.model import ROW_FORMAT, NativeLora, NativeModel, StepTables
from server.model.native.sampling import SampleTable
from server.model.native.training import NativeTraining
from server.model.rank_rows import RankRows
from tests.kits.native import SHAPES, native_library, native_model
from tests.kits.tiny import save_tiny_base
from tests.server.model.native.test_refused_batches import training_of

LENGTH, COPIES = 400, 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    architecture, options = SHAPES["grouped"]
    directory = save_tiny_base(tmp_path_factory.mktemp("phases") / "tiny", architecture, options, seed=3)
    return load_base(resolve_base(str(directory), directory.parent), torch.bfloat16)


@pytest.fixture(scope="module")
def model(base: BaseModel) -> NativeModel:
    return native_model(base, LENGTH, num_threads=2)


@pytest.fixture(scope="module")
def training(base: BaseModel) -> NativeTraining:
    return training_of(base, native_library(), max_positions=LENGTH, num_threads=2)


@pytest.fixture(scope="module")
def training_step(base: BaseModel, training: NativeTraining) -> Callable[[], None]:
    ids = torch.arange(COPIES * LENGTH) % base.config.vocab_size

    def run() -> None:
        hidden = training.forward(ids, [LENGTH] * COPIES)
        loss, d_hidden = training.loss(hidden, ids, 1.0)
        assert loss > 0
        training.backward(d_hidden)

    return run


@pytest.fixture(scope="module")
def step(model: NativeModel) -> Callable[[], None]:
    """Return a step that reads prompts and samples a token after each position."""
    config = model.config
    blocks = -(-LENGTH // 16)
    shape = (COPIES * blocks, config.num_layers, 16, config.num_kv_heads, config.head_dim)
    k, v = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
    lora = NativeLora(RankRows(config.shape, max_rank=1, row_format=ROW_FORMAT, device=torch.device("cpu")), [])
    ids = np.arange(COPIES * LENGTH, dtype=np.int64) % config.vocab_size
    runs = np.array([(i * LENGTH, (i + 1) * LENGTH, 0, i * blocks, LENGTH) for i in range(COPIES)], np.int64)
    table = SampleTable(config.vocab_size)
    for key in range(len(ids)):
        table.add(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0, key=key, num_top=3)

    def run() -> None:
        hidden = model.forward(StepTables(ids, runs, np.arange(COPIES * blocks, dtype=np.int32), k, v, lora))
        assert (model.sample(hidden, table).token_ids >= 0).all()

    return run


def add_up(step: Callable[[], None], take: Callable[[], dict[str, float]], names: Sequence[str]) -> None:
    """Check that the phases add up to over 95 % of a step's time, in one of 20 tries: the core may be busy."""
    step()
    shares = []
    for _ in range(20):
        take()
        begun = time.perf_counter()
        step()
        whole = time.perf_counter() - begun
        spent = take()
        assert list(spent) == list(names)
        assert all(seconds > 0 for seconds in spent.values())
        shares.append(sum(spent.values()) / whole)
        if shares[-1] > 0.95:
            break
    assert 0.95 < shares[-1] <= 1, shares


def count_if_asked_for(step: Callable[[], None], take: Callable[..., dict[str, float]]) -> None:
    take(count=False)
    step()
    assert set(take().values()) == {0.0}
    step()
    assert min(take(count=False).values()) > 0
    step()
    assert set(take(count=False).values()) == {0.0}


def test_phases_add_up_to_the_step(model: NativeModel, step: Callable[[], None]) -> None:
    add_up(step, model.take_phases, PHASES)


def test_phases_add_up_to_the_training_step(training: NativeTraining, training_step: Callable[[], None]) -> None:
    add_up(training_step, training.take_phases, TRAIN_PHASES)


def test_nothing_is_counted_unless_asked_for(model: NativeModel, step: Callable[[], None]) -> None:
    count_if_asked_for(step, model.take_phases)


def test_nothing_is_counted_in_training_unless_asked_for(
    training: NativeTraining, training_step: Callable[[], None]
) -> None:
    count_if_asked_for(training_step, training.take_phases)
