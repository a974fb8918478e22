"""The native passes beside torch's: hidden states and gradients, on tiny bases and on the real one."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adapters.lora import LoraModule, LoraWeights
from server.jobs.scoring import complete, decision_scores
from server.model.base.weights import BaseModel, load_base
from server.model.native.build import NativeUnavailable
from server.model.native.library import computed_by
from server.model.native.load import find_library
from server.model.native.training import NativeTraining
from server.training.checkpoint import Checkpoints
from server.training.dropout import Dropout, LayerInputs
from server.training.encoding import Example, Examples
from server.training.job_data import DataFacts, JobData
from server.training.passes import MicroBatch, NativePass, TorchPass
from server.training.run import Outcome, Run
from server.training.spec import Init, JobSpec, LoraSpec, TrainingSpec
from server.training.trainables import trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import Trainer, TrainingDiverged
from tests.kits.bf16_products import torch_bf16
from tests.kits.cache import CACHE
from tests.kits.engines import random_adapter
from tests.kits.native import tiny_of, widened
from tests.server.training.loop.test_run import Disturbed, Listener, tensors

CPU = torch.device("cpu")
MAX_LENGTH = 160
LENGTHS = (5, 1, 33, 32, 100, 3, 31)  # an odd number in all


@dataclass(frozen=True)
class Passed:
    hidden: torch.Tensor
    loss: float  # nats per counted token
    gradients: torch.Tensor  # of all A and B


def pass_through(
    base: BaseModel,
    start: LoraWeights,
    token_ids: Sequence[int],
    lengths: Sequence[int],
    library: ctypes.CDLL | None,
    taken_off: LoraWeights | None = None,
    dropout: float = 0.0,
) -> Passed:
    """One micro-batch, whose loss is over every token but each text's first."""
    trainable = trainable_rows(base, start, taken_off, max_length=MAX_LENGTH, dropout=dropout, library=library)
    assert isinstance(trainable.passes, TorchPass if library is None else NativePass)
    trainable.begin_micro_batch(0, 0, list(range(len(lengths))), lengths)
    batch = batch_of(token_ids, lengths)
    with torch.no_grad():
        hidden = trainable.passes.forward(batch)
    loss = trainable.accumulate(batch, 1 / len(batch.targets)) / len(batch.targets)
    return Passed(hidden.float(), loss, trainable.gradients.clone())


def batch_of(token_ids: Sequence[int], lengths: Sequence[int]) -> MicroBatch:
    examples, start = [], 0
    for length in lengths:
        examples.append(Example(tuple(token_ids[start : start + length]), (False, *[True] * (length - 1))))
        start += length
    return MicroBatch.of(examples)


def in_fp32(base: BaseModel) -> BaseModel:
    return replace(base, weights=widened(base.weights))


def tokens(base: BaseModel, lengths: Sequence[int]) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    found: list[int] = torch.randint(0, base.config.vocab_size, (sum(lengths),), generator=generator).tolist()
    return found


def uneven(base: BaseModel) -> LoraWeights:
    """Ranks from 1 to 40; a layer without some modules, and one without any."""
    modules = random_adapter(
        base.config.shape,
        5,
        rank=lambda key: (1, 3, 16, 17, 40)[(3 * key.layer + len(key.module)) % 5],
        strength=0.3,
    ).modules
    kept = {
        key: LoraModule(module.a.bfloat16().float(), module.b.bfloat16().float(), 1.0)
        for key, module in modules.items()
        if key.layer != 1 and not (key.layer == 2 and key.module in ("k_proj", "o_proj", "up_proj"))
    }
    return LoraWeights(kept)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_native_gradients_are_closer_to_fp32_than_torchs_16_bits(
    base: BaseModel, library: ctypes.CDLL, dropout: float
) -> None:
    token_ids, start = tokens(base, LENGTHS), uneven(base)
    exact = pass_through(in_fp32(base), start, token_ids, LENGTHS, None, dropout=dropout)
    in_torch = pass_through(base, start, token_ids, LENGTHS, None, dropout=dropout)
    native = pass_through(base, start, token_ids, LENGTHS, library, dropout=dropout)
    assert off(native.hidden, exact.hidden) < min(0.02, off(in_torch.hidden, exact.hidden))
    assert abs(native.loss - exact.loss) < 2e-3
    assert off(native.gradients, exact.gradients) < min(0.03, off(in_torch.gradients, exact.gradients))


def test_every_modules_gradients(grouped: BaseModel, library: ctypes.CDLL) -> None:
    """One by one: a module that hardly counts in the norm of all is held to its own."""
    token_ids = tokens(grouped, LENGTHS)
    adapter = random_adapter(grouped.config.shape, 6, rank=8, strength=0.3)
    for key in adapter.modules:
        start = LoraWeights({key: adapter.modules[key]})
        exact = pass_through(in_fp32(grouped), start, token_ids, LENGTHS, None)
        native = pass_through(grouped, start, token_ids, LENGTHS, library)
        assert off(native.gradients, exact.gradients) < 0.03, key


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_subtracted_rows(grouped: BaseModel, library: ctypes.CDLL, init: Init) -> None:
    start, taken_off = initial_weights(LoraSpec(rank=4, init=init), grouped, seed=0)
    assert taken_off is not None
    token_ids = tokens(grouped, LENGTHS)
    exact = pass_through(in_fp32(grouped), start, token_ids, LENGTHS, None, taken_off)
    native = pass_through(grouped, start, token_ids, LENGTHS, library, taken_off)
    assert off(native.hidden, exact.hidden) < 0.02
    assert off(native.gradients, exact.gradients) < 0.03


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_native_dropout_masks_are_torchs_bit_for_bit(
    grouped: BaseModel, library: ctypes.CDLL, probability: float
) -> None:
    """The gradient of A that one token gives is zero for the features that the token's mask drops, and only for
    them. The last token of a text gives one in every layer if it is alone; else in the last layer, except to keys
    and values."""
    start, last = random_adapter(grouped.config.shape, 6, rank=4, strength=0.3), grouped.config.num_layers - 1
    trainable = trainable_rows(grouped, start, None, max_length=64, dropout=probability, library=library)
    for step, lengths in ((3, (1,)), (4, (1,)), (5, (2,)), (6, (9, 33)), (70_000, (40,))):
        rows = [100 + i for i in range(len(lengths))]
        token_ids = tokens(grouped, lengths)
        trainable.gradients.zero_()
        trainable.begin_micro_batch(2, step, rows, lengths)
        trainable.accumulate(MicroBatch(token_ids, lengths, [len(token_ids) - 1], [7]), 1.0)
        dropout = Dropout(probability, [(2, step, row) for row in rows], lengths)
        for (layer, name), group in trainable.rows.groups.items():
            if lengths != (1,) and layer != last:
                continue
            expected = dropout.kept(LayerInputs.of(layer, {name: group.a.shape[1]}, CPU), name)[-1]
            modules = [m for m in group.modules if lengths == (1,) or m.key.module not in ("k_proj", "v_proj")]
            found = torch.cat([module.d_a for module in modules]).ne(0).any(0)
            assert torch.equal(found, expected), (step, layer, name)
            assert expected.any()


def test_threads_and_timing_do_not_change_a_bit(grouped: BaseModel, library: ctypes.CDLL) -> None:
    lengths = (70, 128, 9, 150, 160, 33)
    token_ids, start = tokens(grouped, lengths), uneven(grouped)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 5, 2):
            torch.set_num_threads(number)
            found.append(pass_through(grouped, start, token_ids, lengths, library, dropout=0.1))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.hidden, found[0].hidden)
        assert other.loss == found[0].loss
        assert torch.equal(other.gradients, found[0].gradients)


def test_a_texts_result_does_not_depend_on_its_batch(grouped: BaseModel, library: ctypes.CDLL) -> None:
    token_ids, start = tokens(grouped, LENGTHS), uneven(grouped)
    together = pass_through(grouped, start, token_ids, LENGTHS, library).hidden
    at = 0
    for length in LENGTHS:
        if length > 1:
            alone = pass_through(grouped, start, token_ids[at : at + length], (length,), library).hidden
            assert torch.equal(alone, together[at : at + length])
        at += length


def test_a_texts_dropout_does_not_depend_on_its_batch(grouped: BaseModel, library: ctypes.CDLL) -> None:
    """Each row alone in its micro-batch: the same bits of its hidden states, and gradients that add up alike."""
    lengths = (33, 5, 100)
    token_ids, start = tokens(grouped, lengths), uneven(grouped)
    trainable = trainable_rows(grouped, start, None, max_length=MAX_LENGTH, dropout=0.3, library=library)
    assert isinstance(trainable.passes, NativePass)
    trainable.begin_micro_batch(0, 9, [4, 7, 2], lengths)
    together = trainable.passes.forward(batch_of(token_ids, lengths))
    trainable.accumulate(batch_of(token_ids, lengths), 0.01)
    gradients = trainable.gradients.clone()
    trainable.gradients.zero_()
    at = 0
    for row, length in zip([4, 7, 2], lengths, strict=True):
        batch = batch_of(token_ids[at : at + length], (length,))
        trainable.begin_micro_batch(0, 9, [row], [length])
        assert torch.equal(trainable.passes.forward(batch), together[at : at + length])
        trainable.accumulate(batch, 0.01)
        at += length
    assert off(trainable.gradients, gradients) < 1e-3


def test_one_pass_after_the_other(grouped: BaseModel, library: ctypes.CDLL) -> None:
    """A larger batch, then a smaller one: nothing of the first is left in the second, and gradients add up."""
    start = uneven(grouped)
    trainable = trainable_rows(grouped, start, None, max_length=MAX_LENGTH, dropout=0.0, library=library)
    small = pass_through(grouped, start, tokens(grouped, (9, 4)), (9, 4), library)
    large = pass_through(grouped, start, tokens(grouped, LENGTHS), LENGTHS, library)
    for lengths, expected in ((LENGTHS, large), ((9, 4), small)):
        trainable.gradients.zero_()
        trainable.accumulate(batch_of(tokens(grouped, lengths), lengths), 1 / (sum(lengths) - len(lengths)))
        assert torch.equal(trainable.gradients, expected.gradients)
    trainable.accumulate(batch_of(tokens(grouped, LENGTHS), LENGTHS), 1 / (sum(LENGTHS) - len(LENGTHS)))
    torch.testing.assert_close(trainable.gradients, small.gradients + large.gradients)


def test_a_loss_that_is_not_finite_is_reported(grouped: BaseModel, library: ctypes.CDLL) -> None:
    modules = random_adapter(grouped.config.shape, 0, rank=4).modules
    for value in (float("nan"), float("inf"), 1e38):
        wild = LoraWeights({key: LoraModule(m.a, torch.full_like(m.b, value), 1.0) for key, m in modules.items()})
        trainable = trainable_rows(grouped, wild, None, max_length=64, dropout=0.0, library=library)
        assert isinstance(trainable.passes, NativePass)
        examples = [Example((3, 4, 5, 6), (False, True, True, True))]
        with pytest.raises(TrainingDiverged, match="not a number in step 1"):
            Trainer(trainable, examples, TrainingSpec(max_steps=1, max_length=64)).run_step()


@pytest.mark.parametrize("is_native", [True, False])
def test_torch_has_one_thread_next_to_native_threads(
    grouped: BaseModel, library: ctypes.CDLL, is_native: bool
) -> None:
    start, given = random_adapter(grouped.config.shape, 1), library if is_native else None
    trainable = trainable_rows(grouped, start, None, max_length=8, dropout=0.0, library=given)
    examples = [Example((3, 4, 5), (False, True, True))]
    trainer = Trainer(trainable, examples, TrainingSpec(max_steps=2, max_length=64))
    seen: list[int] = []

    def leave() -> None:
        seen.append(torch.get_num_threads())
        raise InterruptedError

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(InterruptedError):
            trainer.run_step(leave)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1 if is_native else 3]


def test_torch_trains_bases_that_native_code_does_not_cover(tmp_path: Path, library: ctypes.CDLL) -> None:
    base = tiny_of(tmp_path, "one group", intermediate_size=72)
    said: list[str] = []
    assert find_library(base, CACHE / "native", said.append) is None
    assert said == ["no native code: intermediate_size is no multiple of 32; torch computes instead, more slowly"]
    with pytest.raises(NativeUnavailable, match="intermediate_size"):
        NativeTraining(library, base.config, base.weights, {}, max_positions=64, num_threads=1)


def test_out_of_bounds_reads_are_refused(grouped: BaseModel, library: ctypes.CDLL) -> None:
    training = NativeTraining(library, grouped.config, grouped.weights, {}, max_positions=8, num_threads=1)
    vocab, size = grouped.config.vocab_size, grouped.config.hidden_size
    for ids, lengths in (([3] * 9, [9]), ([3] * 4, [3]), ([3, 4], [2, 0]), ([vocab], [1]), ([-1], [1])):
        with pytest.raises(ValueError, match=r"texts of|of the vocabulary"):
            training.forward(torch.tensor(ids), lengths)
    with pytest.raises(ValueError, match="int64"):
        training.forward(torch.tensor([3], dtype=torch.int32), [1])
    hidden = training.forward(torch.tensor([3, 4]), [2])
    with pytest.raises(ValueError, match="of the vocabulary"):
        training.loss(hidden, torch.tensor([0, vocab]), 1.0)
    for wrong in (hidden.float(), hidden[:1], hidden[:, : size // 2]):
        with pytest.raises(ValueError, match="hidden states must be"):
            training.loss(wrong, torch.tensor([0, 1]), 1.0)
        with pytest.raises(ValueError, match="hidden states must be"):
            training.backward(wrong)
    training.backward(hidden)
    with pytest.raises(ValueError, match="hidden states must be"):
        training.backward(hidden)  # what it needs is let go
    assert training.loss(hidden[:0], torch.tensor([], dtype=torch.int64), 1.0)[0] == 0


def test_a_run_interrupted_anywhere_ends_in_the_same_bytes(
    grouped: BaseModel, library: ctypes.CDLL, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A job's run, with native code: other bytes than torch's, and always the same ones."""
    ids = [[status.value % 256, 7, 9 + index] for index, status in enumerate(list(HTTPStatus)[:12])]
    examples = [Example(tuple(row), (False, True, True)) for row in ids]
    facts = DataFacts("d", len(ids), 36, 24, 0, "d", len(ids))
    data = JobData(Examples(examples), None, (), facts, grouped.digest)
    lora = LoraSpec(rank=4, dropout=0.2)
    training = TrainingSpec(epochs=5, learning_rate=1e-2, batch_size=4, max_length=16, checkpoint_steps=2)
    spec = JobSpec("codes", lora=lora, training=training)

    def run(directory: str, token: int, end: int | None = None, native: bool = True) -> tuple[Outcome, Listener]:
        checkpoints, listener = Checkpoints(tmp_path / directory, token), Listener(end)
        given = library if native else None
        return Run(
            spec, data, grouped, checkpoints, listener, complete, decision_scores, library=given
        ).run(), listener

    whole, _ = run("whole", 1)
    for token, end in enumerate((3, 6, 4), 1):
        with pytest.raises(Disturbed):
            run("parts", token, end)
    last, listener = run("parts", 9)
    assert listener.steps[0] > 1, "it went on from a checkpoint"
    assert equal(last, whole)
    assert last.counters.computed_by == [computed_by(library)]

    in_torch, _ = run("torch", 1, native=False)
    assert not equal(in_torch, whole)
    with pytest.raises(Disturbed):
        run("both", 1, 8, native=False)
    with caplog.at_level("WARNING"):
        both, listener = run("both", 2)
    assert listener.steps[0] > 1
    assert both.counters.computed_by == ["torch", computed_by(library)]
    assert "the bytes will differ from those of either" in caplog.text


def equal(one: Outcome, other: Outcome) -> bool:
    pairs = zip(tensors(one.weights), tensors(other.weights), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.thorough  # tiny bases above; the README's tour trains on this one
def test_the_real_base(base_dir: Path, real_base: BaseModel, library: ctypes.CDLL) -> None:
    """Real text: hidden states and gradients are closer to fp32 than torch's bf16, and six steps lose as much."""
    base = load_base(base_dir, torch.bfloat16)
    tokenizer = base.tokenizer
    texts: list[list[int]] = [
        tokenizer.encode(f"{status.value} {status.phrase}: {status.description}.") for status in HTTPStatus
    ]
    texts = [text for text in texts if len(text) > 6][:12]
    lengths = [len(text) for text in texts]
    flat = [token for text in texts for token in text]
    start, _ = initial_weights(LoraSpec(rank=16, alpha=32), base, seed=0)
    exact = pass_through(real_base, start, flat, lengths, None)
    with torch_bf16():
        in_torch = pass_through(base, start, flat, lengths, None)
    native = pass_through(base, start, flat, lengths, library)
    assert off(native.hidden, exact.hidden) < min(0.02, off(in_torch.hidden, exact.hidden))
    assert off(native.gradients, exact.gradients) < off(in_torch.gradients, exact.gradients)

    examples = [Example(tuple(text), (False, *[True] * (len(text) - 1))) for text in texts]
    spec = TrainingSpec(max_steps=6, learning_rate=1e-3, batch_size=4, max_length=MAX_LENGTH, warmup_ratio=0.0)
    losses = []
    for model, given in ((real_base, None), (base, library)):
        trainable = trainable_rows(model, start, None, max_length=MAX_LENGTH, dropout=0.0, library=given)
        trainer = Trainer(trainable, examples, spec)
        losses.append([trainer.run_step().loss for _ in range(6)])
    assert losses[1][-1] < 0.5 * losses[1][0], "it learns"
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), atol=0.05, rtol=0.02)


def test_the_loss_of_more_rows_than_a_chunk(base_dir: Path, real_base: BaseModel, library: ctypes.CDLL) -> None:
    """300 rows of the real head: torch's cross-entropy in fp32, and its gradient."""
    base = load_base(base_dir, torch.bfloat16)
    training = NativeTraining(library, base.config, base.weights, {}, max_positions=64, num_threads=2)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(300, base.config.hidden_size, generator=generator).bfloat16()
    targets = torch.randint(0, base.config.vocab_size, (300,), generator=generator)
    targets[:4] = torch.tensor([0, 15, 16, base.config.vocab_size - 1])
    loss, d_hidden = training.loss(hidden, targets, 0.5)
    leaf = hidden.float().requires_grad_()
    expected = F.cross_entropy(leaf @ real_base.weights.lm_head.t(), targets, reduction="sum")
    torch.autograd.backward(0.5 * expected)
    assert leaf.grad is not None
    assert abs(loss - float(expected.detach())) < 1e-5 * float(expected.detach())
    assert off(d_hidden.float(), leaf.grad) < 0.005
