"""Evaluations against transformers: loss and accuracy row by row."""

import math
from pathlib import Path

import pytest

from server.model.base.weights import BaseModel
from server.model.smollm import NoAdapters
from server.training.encoding import Example, Examples
from server.training.evaluate import Evaluation, evaluate
from tests.kits.engines import random_adapter
from tests.kits.oracles.hugging_face import load_reference, logits, merged
from tests.server.training.data.rows_kit import make_examples, measured, model_of, pass_of, rows_of


def assert_agrees(found: Evaluation, expected: tuple[float, float, int], num_rows: int) -> None:
    loss, accuracy, num_tokens = expected
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert (found.num_tokens, found.num_rows, found.exact_match) == (num_tokens, num_rows, None)


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_loss_and_accuracy(max_tokens: int, tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """Of the base and under an adapter, packed and alone."""
    reference, examples = load_reference(tiny_base_dir), make_examples()
    greedily = [int(logits(reference, [*range(3, 3 + n)])[-1].argmax()) for n in (5, 6)]
    examples += [Example((*range(3, 8), greedily[0]), (*[False] * 5, True)), make_examples((300,), seed=3)[0]]
    model = model_of(tiny_base, 512)
    found = evaluate(pass_of(model, NoAdapters()), examples, max_tokens=max_tokens)
    assert_agrees(found, measured(reference, examples), len(examples))
    assert 0 < found.accuracy < 1

    weights = random_adapter(tiny_base.config.shape, 3, rank=4)
    tuned = evaluate(pass_of(model, rows_of(weights, tiny_base)), Examples(examples), max_tokens=max_tokens)
    with merged(reference, [(weights, 1.0)]):
        assert_agrees(tuned, measured(reference, examples), len(examples))
    assert abs(tuned.loss - found.loss) > 0.1


def test_more_counted_tokens_than_a_chunk(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    examples = make_examples((400, 500, 450), seed=1)
    found = evaluate(pass_of(model_of(tiny_base, 512), NoAdapters()), examples)
    assert found.num_tokens > 600
    assert_agrees(found, measured(load_reference(tiny_base_dir), examples), 3)


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_losses_of_rows(max_tokens: int, tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """In their order, however they are packed. Equal rows are one entry, and rows without a counted token none."""
    reference, examples = load_reference(tiny_base_dir), make_examples((5, 33, 1, 9, 17))
    passes = pass_of(model_of(tiny_base), NoAdapters())
    found = evaluate(passes, [*examples, examples[1]], max_tokens=max_tokens)
    counted = [example for example in examples if any(example.is_target)]
    assert len(found.rows) == len(counted) == 4
    for (loss, count), example in zip(found.rows, counted, strict=True):
        mean, _, num_tokens = measured(reference, [example])
        copies = 2 if example == examples[1] else 1
        assert count == copies * num_tokens
        assert loss == pytest.approx(copies * num_tokens * mean, abs=1e-3)


def test_windows_of_a_row_are_one_entry(tiny_base: BaseModel) -> None:
    """Documents that were split into windows: their intervals were those of many independent rows."""
    one, two, three = make_examples((5, 33, 9))
    examples = Examples()
    for source, windows in enumerate([(one, two), (three,), (one, two), (one,)]):
        for window in windows:
            examples.append(window, source)
    passes = pass_of(model_of(tiny_base), NoAdapters())
    found = evaluate(passes, examples, keys=examples.row_keys())
    parts = [evaluate(passes, [example]).rows[0] for example in (one, two, three)]
    (loss, count), (first, second, third) = found.rows[0], parts
    assert count == 2 * (first[1] + second[1])
    assert loss == pytest.approx(2 * (first[0] + second[0]), abs=1e-3)
    assert [count for _, count in found.rows[1:]] == [third[1], first[1]]


def test_nothing_is_trained_or_kept(tiny_base: BaseModel) -> None:
    rows = rows_of(random_adapter(tiny_base.config.shape, 3, rank=4), tiny_base)
    evaluate(pass_of(model_of(tiny_base), rows), make_examples())
    assert all(leaf.grad is None for leaf in rows.leaves)
    assert not rows.gradients.any()


def test_the_callback_runs_between_micro_batches(tiny_base: BaseModel) -> None:
    calls: list[None] = []
    evaluate(
        pass_of(model_of(tiny_base), NoAdapters()),
        make_examples((5, 6, 7)),
        max_tokens=1,
        yield_or_leave=lambda: calls.append(None),
    )
    assert len(calls) == 3

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        evaluate(pass_of(model_of(tiny_base), NoAdapters()), make_examples(), yield_or_leave=stop)


def test_no_counted_token(tiny_base: BaseModel) -> None:
    for examples in ([], make_examples((1, 1))):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate(pass_of(model_of(tiny_base), NoAdapters()), examples)


def test_a_broken_adapter_has_no_loss(tiny_base: BaseModel) -> None:
    """It is returned as it is, and the caller decides what to do."""
    weights = random_adapter(tiny_base.config.shape, 3, rank=4)
    rows = rows_of(weights, tiny_base)
    rows.masters.fill_(float("nan"))
    rows.refresh()
    assert math.isnan(evaluate(pass_of(model_of(tiny_base), rows), make_examples()).loss)
    assert Evaluation(1e6, 0, 1, 1).perplexity < float("inf")
