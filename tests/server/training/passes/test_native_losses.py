"""Held-out losses by native code beside torch's: the same as far as 16 bits tell, the same bits in any company."""

import ctypes
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import pytest
import torch

from adapters.lora import LoraWeights
from server.jobs.scoring import complete, decision_scores
from server.model.base.weights import BaseModel, load_base
from server.training.checkpoint import Checkpoints
from server.training.encoding import Example, Examples
from server.training.evaluate import Evaluation, evaluate
from server.training.job_data import DataFacts, JobData
from server.training.passes import NativePass, Pass, TorchPass
from server.training.run import Run
from server.training.spec import JobSpec, LoraSpec, TrainingSpec
from server.training.trainables import trainable_rows
from server.training.trained_rows import initial_weights
from tests.kits.bf16_products import has_amx, torch_bf16
from tests.server.training.data.rows_kit import make_examples
from tests.server.training.loop.test_run import Listener
from tests.server.training.passes.test_native_pass import batch_of, in_fp32, tokens, uneven

LONGEST = 320
LENGTHS = (5, 1, 33, 32, 100, 3, 31, 300, 2)


def passes_of(base: BaseModel, weights: LoraWeights, library: ctypes.CDLL | None) -> Pass:
    passes = trainable_rows(base, weights, None, max_length=LONGEST, dropout=0.0, library=library).passes
    assert isinstance(passes, TorchPass if library is None else NativePass)
    return passes


def assert_near(
    base: BaseModel,
    weights: LoraWeights,
    library: ctypes.CDLL,
    examples: Sequence[Example],
    chance: float = 5e-4,
) -> float:
    """Assert that the mean loss is at most `chance` from fp32's, or at most as far as torch's.

    Return how far the rows' losses are from fp32's, as a multiple of how far torch's are.
    """
    exact = evaluate(passes_of(in_fp32(base), weights, None), examples)
    with torch_bf16():
        in_torch = evaluate(passes_of(base, weights, None), examples)
    native = evaluate(passes_of(base, weights, library), examples)
    assert abs(native.loss - exact.loss) < max(chance, abs(in_torch.loss - exact.loss))
    assert native.perplexity == pytest.approx(exact.perplexity, rel=5e-3)
    assert abs(native.accuracy - exact.accuracy) <= 3 / exact.num_tokens
    assert (native.num_rows, native.num_tokens) == (exact.num_rows, exact.num_tokens)
    found, torchs, wanted = ([loss for loss, _ in of.rows] for of in (native, in_torch, exact))
    return math.dist(found, wanted) / math.dist(torchs, wanted)


def test_native_losses_are_torchs(base: BaseModel, library: ctypes.CDLL) -> None:
    """Of the base alone and under an adapter, rows without a counted token among them."""
    examples = make_examples(LENGTHS, seed=2)
    for weights in (LoraWeights({}), uneven(base)):
        assert_near(base, weights, library, examples)


def test_threads_and_batches_do_not_change_a_bit(grouped: BaseModel, library: ctypes.CDLL) -> None:
    examples, weights = make_examples(LENGTHS, seed=2), uneven(grouped)
    threads = torch.get_num_threads()
    found: set[Evaluation] = set()
    try:
        for number, max_tokens in ((1, 1), (2, 40), (3, 150), (5, 10_000), (2, 2048)):
            torch.set_num_threads(number)
            random.Random(number).shuffle(examples)
            one = evaluate(passes_of(grouped, weights, library), examples, max_tokens=max_tokens)
            found.add(replace(one, rows=tuple(sorted(one.rows))))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1, found


def test_it_is_the_loss_that_is_trained_on(grouped: BaseModel, library: ctypes.CDLL) -> None:
    """Between two training passes, which it changes nothing of."""
    batch = batch_of(tokens(grouped, LENGTHS), LENGTHS)
    trainable = trainable_rows(grouped, uneven(grouped), None, max_length=LONGEST, dropout=0.0, library=library)
    loss = trainable.accumulate(batch, 1.0)
    gradients = trainable.gradients.clone()
    assert sum(trainable.passes.measure(batch).losses) == loss
    assert torch.equal(trainable.gradients, gradients)
    trainable.gradients.zero_()
    assert trainable.accumulate(batch, 1.0) == loss
    assert torch.equal(trainable.gradients, gradients)


def test_a_job_measures_the_base_and_what_it_trained(
    grouped: BaseModel, library: ctypes.CDLL, tmp_path: Path
) -> None:
    examples = make_examples((9, 12, 7, 15), seed=4)
    facts = DataFacts("d", 4, 43, 39, 0, "d", 4)
    data = JobData(Examples(examples), Examples(examples), (), facts, grouped.digest)
    training = TrainingSpec(epochs=3, learning_rate=1e-2, batch_size=2, max_length=16, eval_steps=2)
    spec = JobSpec("codes", lora=LoraSpec(rank=4), training=training)
    checkpoints = Checkpoints(tmp_path, 1)
    outcome = Run(spec, data, grouped, checkpoints, Listener(), complete, decision_scores, library=library).run()
    assert outcome.weights is not None
    base, tuned = outcome.base.held_out, outcome.tuned.held_out
    assert base is not None
    assert tuned is not None
    assert base == evaluate(passes_of(grouped, LoraWeights({}), library), examples)
    assert tuned == evaluate(passes_of(grouped, outcome.weights, library), examples)
    assert dict(outcome.counters.eval_curve)[outcome.step] == tuned.loss
    assert base != evaluate(passes_of(grouped, LoraWeights({}), None), examples), "not by torch"
    assert tuned.loss < base.loss


@pytest.mark.thorough  # tiny bases above
def test_of_the_real_base(base_dir: Path, library: ctypes.CDLL) -> None:
    base = load_base(base_dir, torch.bfloat16)
    texts = [base.tokenizer.encode(f"{s.value} {s.phrase}: {s.description}.") for s in HTTPStatus]
    examples = [Example(tuple(text), (False, *[True] * (len(text) - 1))) for text in texts]
    start, _ = initial_weights(LoraSpec(rank=16, alpha=32, init="gaussian"), base, seed=0)
    # Rows' errors cancel in the mean by chance, and with AMX less than torch's, so rows are compared, too.
    chance = 4e-3 if has_amx() else 5e-4
    assert assert_near(base, start, library, examples, chance) < 1
