"""What the phases of native steps take adds up to the steps."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from server.model.native.abi import PHASES
from server.model.native.model import ROW_FORMAT, NativeLora, NativeModel
from server.model.native.sampling import SampleTable
from server.model.rank_rows import RankRows
from tests.native_kit import SHAPES, native_model
from tests.tiny import save_tiny_base

LENGTH, COPIES = 400, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeModel:
    architecture, options = SHAPES["grouped"]
    directory = save_tiny_base(tmp_path_factory.mktemp("phases") / "tiny", architecture, options, seed=3)
    return native_model(
        load_base(resolve_base(str(directory), directory.parent), torch.bfloat16), LENGTH, num_threads=2
    )


@pytest.fixture(scope="module")
def step(model: NativeModel) -> Callable[[], None]:
    """A prompt many times, and a token after each position."""
    config = model.config
    blocks = -(-LENGTH // 16)
    shape = (config.num_layers, COPIES * blocks, 16, config.num_kv_heads, config.head_dim)
    k, v = (torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))
    lora = NativeLora(RankRows(config.shape, max_rank=1, row_format=ROW_FORMAT, device=torch.device("cpu")), [])
    ids = np.arange(COPIES * LENGTH, dtype=np.int64) % config.vocab_size
    runs = np.array([(i * LENGTH, (i + 1) * LENGTH, 0, i * blocks) for i in range(COPIES)], np.int64)
    table = SampleTable(config.vocab_size)
    for key in range(len(ids)):
        table.add(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0, key=key, num_top=3)

    def run() -> None:
        hidden = model.forward(ids, runs, np.arange(COPIES * blocks, dtype=np.int32), k, v, lora)
        assert (model.sample(hidden, table).token_ids >= 0).all()

    return run


def test_phases_add_up_to_the_step(model: NativeModel, step: Callable[[], None]) -> None:
    """Within 5 %: of what the calls take, beside Python's share, as soon as nothing else takes the core."""
    step()
    shares = []
    for _ in range(20):
        model.take_phases()
        begun = time.perf_counter()
        step()
        whole = time.perf_counter() - begun
        spent = model.take_phases()
        assert list(spent) == list(PHASES)
        assert all(seconds > 0 for seconds in spent.values())
        shares.append(sum(spent.values()) / whole)
        if shares[-1] > 0.95:
            break
    assert 0.95 < shares[-1] <= 1, shares


def test_nothing_is_counted_unless_asked_for(model: NativeModel, step: Callable[[], None]) -> None:
    model.take_phases(count=False)
    step()
    assert set(model.take_phases().values()) == {0.0}
    step()
    assert min(model.take_phases(count=False).values()) > 0
    step()
    assert set(model.take_phases(count=False).values()) == {0.0}
