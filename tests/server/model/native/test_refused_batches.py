"""Batches of training that would read or write outside of what there is: refused, and the next one runs."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.native.training import NativeDropout, NativeGroup, NativeRows, NativeTraining
from server.model.rank_rows import GROUPS, GroupKey, GroupLayout
from tests.kits.native import SHAPES, native_library
from tests.kits.tiny import save_tiny_base

NUM_GRADIENTS = 1_000_000  # more than all modules of `base` need


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return native_library()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    architecture, options = SHAPES["grouped"]
    directory = save_tiny_base(tmp_path_factory.mktemp("refused") / "tiny", architecture, options, seed=3)
    return load_base(resolve_base(str(directory), directory.parent), torch.bfloat16)


def groups_of(base: BaseModel) -> dict[GroupKey, NativeGroup]:
    groups: dict[GroupKey, NativeGroup] = {}
    end = 0  # of the gradients so far
    for layer in range(base.config.num_layers):
        for name in GROUPS:
            layout = GroupLayout.of(name, base.config.shape)
            modules, row, out_start = [], 0, 0
            for out in layout.out_features.values():
                b_start = end + 16 * layout.in_features
                modules.append(NativeRows(row, 16, out_start, out, 16, end, b_start, 1.0))
                row, out_start, end = row + 16, out_start + out, b_start + 16 * out
            a, b = (torch.zeros(row, size, dtype=torch.bfloat16) for size in (layout.in_features, out_start))
            groups[layer, name] = NativeGroup(a, b, modules)
    assert end <= NUM_GRADIENTS
    return groups


def training_of(
    base: BaseModel,
    library: ctypes.CDLL,
    changed: NativeGroup | None = None,
    key: GroupKey = (1, "qkv"),
    gradients: torch.Tensor | None = None,
    max_positions: int = 8,
    num_threads: int = 1,
) -> NativeTraining:
    groups = groups_of(base)
    if changed is not None:
        groups[key] = changed
    gradients = torch.zeros(NUM_GRADIENTS) if gradients is None else gradients
    return NativeTraining(
        *(library, base.config, base.weights, groups),
        max_positions=max_positions,
        num_threads=num_threads,
        gradients=gradients,
    )


@pytest.mark.parametrize(
    ("index", "change", "reason"),
    [
        (0, {"row": 8}, "module 0 has 16 rows from 8 on, of 48: they come in units of 16"),
        (0, {"num_rows": 8}, "module 0 has 8 rows"),
        (2, {"num_rows": 32}, "module 2 has 32 rows from 32 on, of 48"),
        (1, {"row": -16}, "module 1 has 16 rows from -16 on"),
        (2, {"out_start": 288}, "module 2 has 64 outputs from 288 on, of 320"),
        (1, {"out_start": -32}, "module 1 has 64 outputs from -32 on"),
        (1, {"out_start": 200}, "module 1 has 64 outputs from 200 on"),
        (1, {"out_features": 40}, "module 1 has 40 outputs"),
        (1, {"out_features": -32}, "module 1 has -32 outputs"),
        (1, {"trained": 17}, "module 1 trains 1 times 17 of its 16 rows"),
        (1, {"trained": 0}, "module 1 trains 1 times 0 of its 16 rows"),
        (2, {"trained": 9, "repeats": 2}, "module 2 trains 2 times 9 of its 16 rows"),
        (2, {"repeats": 0}, "module 2 trains 0 times 16 of its 16 rows"),
        (0, {"a_start": -1}, "module 0 has gradients from -1 and "),
        (0, {"a_start": NUM_GRADIENTS - 1}, f"on, of {NUM_GRADIENTS}"),
        (0, {"b_start": -1}, r"module 0 has gradients from \d+ and -1 on"),
        (0, {"b_start": NUM_GRADIENTS - 1}, f"and {NUM_GRADIENTS - 1} on, of {NUM_GRADIENTS}"),
    ],
)
def test_modules_in_training(
    base: BaseModel, library: ctypes.CDLL, index: int, change: dict[str, int], reason: str
) -> None:
    group = groups_of(base)[1, "qkv"]
    modules = list(group.modules)
    modules[index] = replace(modules[index], **change)
    training = training_of(base, library, replace(group, modules=modules))
    with pytest.raises(ValueError, match=reason):
        training.forward(torch.tensor([3, 4]), [2])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a", lambda x: x.float()),
        ("a", lambda x: x[:, :64].contiguous()),
        ("b", lambda x: x[:16]),
        ("b", lambda x: x.t().contiguous().t()),
    ],
)
def test_matrices_in_training(
    base: BaseModel, library: ctypes.CDLL, name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    group = groups_of(base)[1, "qkv"]
    changed: dict[str, Any] = {name: change(getattr(group, name))}
    wrong = replace(group, **changed)
    with pytest.raises(ValueError, match=rf"{name} of \(1, 'qkv'\) must be"):
        training_of(base, library, wrong)


@pytest.mark.parametrize("gradients", [torch.zeros(8, 8), torch.zeros(8).bfloat16(), torch.zeros(16)[::2]])
def test_gradients_are_flat(base: BaseModel, library: ctypes.CDLL, gradients: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="gradients must be fp32, in one row"):
        training_of(base, library, gradients=gradients)


def test_a_batch_of_training(base: BaseModel, library: ctypes.CDLL) -> None:
    """Ids and lengths are those of test_native_pass; here is what dropout must be; it goes on after each."""
    training = training_of(base, library)
    token_ids = torch.tensor([3, 4, 5])
    keys = np.arange(3, dtype=np.uint64)
    dropout = NativeDropout(keys, 32768, 2.0)
    expected = training.forward(token_ids, [2, 1], dropout)
    for wrong, reason in (
        (replace(dropout, keys=keys[:2]), "the keys of dropout must be uint64"),
        (replace(dropout, keys=keys.astype(np.int64)), "the keys of dropout must be uint64"),
        (replace(dropout, keys=np.arange(6, dtype=np.uint64)[::2]), "the keys of dropout must be uint64"),
        (replace(dropout, num_dropped=65536), "65536 of 65536 features are dropped"),
        (replace(dropout, num_dropped=-1), "-1 of 65536 features are dropped"),
    ):
        with pytest.raises(ValueError, match=reason):
            training.forward(token_ids, [2, 1], wrong)
        assert torch.equal(training.forward(token_ids, [2, 1], dropout), expected)
        training.backward(expected)
    training.forward(token_ids, [2, 1], dropout)
    with pytest.raises(ValueError, match=r"token id 512 is not one of the vocabulary of 512"):
        training.forward(torch.tensor([3, 512, 5]), [2, 1], dropout)
    with pytest.raises(ValueError, match="hidden states must be"):
        training.backward(expected)  # the batch that was refused has taken the place of the one before


def test_no_texts(base: BaseModel, library: ctypes.CDLL) -> None:
    training = training_of(base, library)
    for token_ids, lengths in (([], []), ([3], []), ([], [1])):
        with pytest.raises(ValueError, match="texts of"):
            training.forward(torch.tensor(token_ids, dtype=torch.int64), lengths)
