"""Dropout masks in torch: names alone decide them, their bits are the hash's, and they are independent.

test_native_pass.py compares native code's masks with these.
"""

import pytest
import torch

from server.model.native.training import place_of
from server.training.dropout import Dropout, LayerInputs, RowName, hash_name
from server.training.trained_rows import stream

CPU = torch.device("cpu")


def mask(
    dropout: Dropout, layer: int = 0, group: str = "o", size: int = 40, device: torch.device = CPU
) -> torch.Tensor:
    return dropout.kept(LayerInputs.of(layer, {group: size}, device), group)


def rows_of(num_rows: int, seed: int = 0) -> list[RowName]:
    return [(seed, row // 8, row) for row in range(num_rows)]


def test_a_rows_mask_does_not_depend_on_others() -> None:
    first, second = (7, 0, 12), (7, 0, 5)
    together = mask(Dropout(0.3, [first, second], [4, 5]))
    other_way = mask(Dropout(0.3, [second, first], [5, 4]))
    assert torch.equal(together[:4], mask(Dropout(0.3, [first], [4])))
    assert torch.equal(together, torch.cat((other_way[5:], other_way[:5])))
    assert torch.equal(together[:3], mask(Dropout(0.3, [first], [3]))), "nor on the row's later tokens"
    assert together.dtype is torch.bool


def test_each_name_layer_and_group_has_its_own_mask() -> None:
    def drawn(seed: int = 7, step: int = 0, row: int = 12, layer: int = 1, group: str = "qkv") -> torch.Tensor:
        return mask(Dropout(0.5, [(seed, step, row)], [9]), layer, group)

    assert torch.equal(drawn(), drawn())
    for other in (drawn(seed=8), drawn(step=1), drawn(row=13), drawn(layer=2), drawn(group="o")):
        assert 0.3 < (drawn() == other).float().mean() < 0.7


@pytest.mark.parametrize("probability", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_kept_share(probability: float) -> None:
    dropout = Dropout(probability, [(0, step, 0) for step in range(100)], [10] * 100)
    kept = mask(dropout, size=1000)
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - probability)) <= 5 * deviation + 2**-17
    assert dropout.factor == pytest.approx(1 / (1 - probability), rel=2**-17 / (1 - probability))


def test_the_share_that_is_left_is_the_factors() -> None:
    """Where a probability is no multiple of 2^-16, the factor is that of the rounded one; one can't drop all."""
    for probability, num_dropped in ((0.05, 3277), (1e-6, 0), (1 - 2**-16, 65535), (0.999999, 65535)):
        dropout = Dropout(probability, [(0, 0, 0)], [1])
        assert dropout.num_dropped == num_dropped
        assert dropout.factor * (65536 - num_dropped) == pytest.approx(65536)


def test_the_share_is_the_same_in_every_feature_and_token() -> None:
    kept = mask(Dropout(0.5, [(0, step, 0) for step in range(400)], [3] * 400), size=20).float()
    assert (kept.mean(0) - 0.5).abs().max() < 0.1
    assert (kept.view(400, 3, 20).mean((0, 2)) - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_masks_are_independent(probability: float) -> None:
    """Every pair of features over many tokens, and every pair of tokens over many features: positions of a row,
    rows and steps, layers and groups. The largest of so many correlations is as large as chance has it."""
    count = 400
    many = Dropout(probability, rows_of(2000), [4] * 2000)  # 8,000 tokens
    by_feature = mask(many, size=count).t()
    few = Dropout(
        probability, [(seed, step, row) for seed in (0, 1) for step in (0, 1) for row in (0, 1, 2)], [8] * 12
    )
    layers = [mask(few, layer, group, 8192) for layer in (0, 1, 29) for group in ("qkv", "o", "gate_up", "down")]
    by_token = torch.cat(layers)  # 96 tokens in 12 groups
    for drawn in (by_feature, by_token):
        x = (drawn.double() - (1 - probability)) / (probability * (1 - probability)) ** 0.5
        z = (x @ x.t() / drawn.shape[1] ** 0.5).triu(1)  # about N(0, 1) above the diagonal, if independent
        pairs = len(x) * (len(x) - 1) / 2
        assert abs(float((z**2).sum()) / pairs - 1) < 5 * (2 / pairs) ** 0.5
        assert z.abs().max() < 6


def test_neighbours_that_are_dropped_together() -> None:
    """The counts of all patterns of eight neighbours in a row of features, and in a column of positions."""
    kept = mask(Dropout(0.5, rows_of(64), [512] * 64), size=256)  # 8.4 million
    for bits in (kept, kept.view(64, 512, 256).transpose(1, 2)):
        patterns = bits.reshape(-1, 8).long() @ (1 << torch.arange(8))
        counts = torch.bincount(patterns, minlength=256).double()
        expected = len(patterns) / 256
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5


def hash_of(key: int, counter: int) -> int:
    """As `kernels/dropout.h` says it, number by number."""
    x = (key + counter * 0x61C88647) % 2**32
    x ^= x >> 16
    x = (x + (key >> 32)) % 2**32
    for multiplier in (0x21F0AAAD, 0x735A2D97):
        x = x * multiplier % 2**32
        x ^= x >> 16
    return x


@pytest.mark.parametrize("size", [64, 72, 33])
def test_the_bits_are_the_hashs(size: int) -> None:
    """An odd number of features included, which only torch has."""
    rows = [(3, 1, 4), (3, 1, 5)]
    dropout, layer, group = Dropout(0.4, rows, [3, 2]), 29, "down"
    kept = mask(dropout, layer, group, size)
    states = [hash_name("dropout", *row) for row in rows]
    keys = []
    for state, length in zip(states, (3, 2), strict=True):
        for number in range(1, length + 1):
            z = (state + number * 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            keys.append(z ^ z >> 31)
    half, threshold = (size + 1) // 2, round(0.4 * 65536)
    for token, key in enumerate(keys):
        for feature in range(size):
            number = hash_of(key, (place_of((layer, group)) << 16) + feature % half)
            bits = number % 65536 if feature < half else number >> 16
            signed = bits - 65536 if bits >= 32768 else bits
            assert kept[token, feature].item() == (signed + 32768 >= threshold), (token, feature)


def test_a_layers_groups_together_and_apart() -> None:
    together, apart = (Dropout(0.5, [(1, 2, 3)], [5]) for _ in range(2))
    sizes = {"qkv": 32, "o": 48, "down": 33}
    inputs = LayerInputs.of(2, sizes, CPU)
    for _ in range(2):  # a second forward pass of the same micro-batch has the same masks
        for group, size in sizes.items():
            assert torch.equal(together.kept(inputs, group), mask(apart, 2, group, size))


def test_streams_depend_on_the_whole_name() -> None:
    draws = [
        torch.randn(4, generator=stream(*name)).tolist()
        for name in [
            ("init", 1, 2, "q"),
            ("init", 12, "q"),
            ("init", 1, "2q"),
            ("dropout", 1, 2, "q"),
            ("init", 1),
        ]
    ]
    assert all(draws.count(draw) == 1 for draw in draws)
    assert draws[0] == torch.randn(4, generator=stream("init", 1, 2, "q")).tolist()
