"""Dropout masks: the row's stream decides them, not its company, and their share is the one asked for."""

import pytest
import torch

from server.training.trained_rows import Dropout, stream

X = torch.zeros(9, 40)


def test_a_rows_mask_does_not_depend_on_others() -> None:
    first, second = (7, 0, 12), (7, 0, 5)
    together = Dropout(0.3, [first, second], [4, 5]).kept(1, "qkv", X)
    other_way = Dropout(0.3, [second, first], [5, 4]).kept(1, "qkv", X)
    assert torch.equal(together[:4], Dropout(0.3, [first], [4]).kept(1, "qkv", X[:4]))
    assert torch.equal(together, torch.cat((other_way[5:], other_way[:5])))
    assert together.dtype is torch.bool


def test_each_stream_layer_and_group_has_its_own_mask() -> None:
    def mask(seed: int = 7, step: int = 0, row: int = 12, layer: int = 1, group: str = "qkv") -> torch.Tensor:
        return Dropout(0.5, [(seed, step, row)], [9]).kept(layer, group, X)

    assert torch.equal(mask(), mask())
    for other in (mask(seed=8), mask(step=1), mask(row=13), mask(layer=2), mask(group="o")):
        assert 0.3 < (mask() == other).float().mean() < 0.7


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_the_kept_share(probability: float) -> None:
    dropout = Dropout(probability, [(0, step) for step in range(100)], [10] * 100)
    kept = dropout.kept(0, "o", torch.zeros(1000, 100))
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - probability)) <= 5 * deviation
    assert dropout.factor * (1 - probability) == pytest.approx(1)


def test_the_share_is_the_same_in_every_feature_and_token() -> None:
    kept = Dropout(0.5, [(0, step) for step in range(400)], [3] * 400).kept(0, "o", torch.zeros(1200, 20)).float()
    assert (kept.mean(0) - 0.5).abs().max() < 0.1
    assert (kept.view(400, 3, 20).mean((0, 2)) - 0.5).abs().max() < 0.1


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
