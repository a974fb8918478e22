"""Task of the training benchmarks: classify a sentence as positive or negative by the likelier of two
completions."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapters.lora import LoraModule, LoraWeights
from benchmarks.training.ratings import Rated
from server.model.base.weights import BaseModel
from server.model.smollm import Adapters, SmolLM
from server.model.text.chat import PromptEncoder
from server.training.encoding import Examples, RowEncoder
from server.training.passes import PackedAttention
from server.training.rows import CompletionRow
from server.training.spec import JobSpec
from server.training.trainables import TrainableModel, TrainableRows, trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import StepResult, Trainer, pack

LABELS = (" negative", " positive")
MAX_LENGTH = 128
MAX_TOKENS = 1024
"""Maximum tokens of a batch of prompts."""


@dataclass(frozen=True)
class Score:
    """Shares between 0 and 1. Macro-F1 is the mean of both labels' F1."""

    accuracy: float
    macro_f1: float


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained adapter and its steps."""

    trainable: TrainableRows | TrainableModel
    steps: tuple[StepResult, ...]

    @property
    def model(self) -> SmolLM:
        return self.trainable.model

    @property
    def adapters(self) -> Adapters:
        return self.trainable.adapters

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second inside steps, without the first one."""
        timed = self.steps[1:] or self.steps
        return sum(step.num_tokens for step in timed) / sum(step.seconds for step in timed)


def prompt_of(sentence: Rated) -> str:
    return f"Sentence: {sentence.text}\nSentiment:"


def examples_of(base: BaseModel, sentences: Sequence[Rated]) -> Examples:
    """Return rows whose completion is the label, as a job encodes them."""
    ends = base.config.eos_token_ids
    encoder = RowEncoder(PromptEncoder(base.tokenizer), ends[0], ends)
    fitting = [s for s in sentences if len(base.tokenizer.encode(prompt_of(s))) <= MAX_LENGTH - 2]
    rows = [CompletionRow(prompt_of(s), LABELS[s.is_positive]) for s in fitting]
    return encoder.encode_all(rows, MAX_LENGTH).examples


def train(
    base: BaseModel,
    spec: JobSpec,
    examples: Examples,
    say: Callable[[str], None],
    library: ctypes.CDLL | None = None,
) -> Trained:
    """Train as a job does, without evaluations and checkpoints; with native code if it is given."""
    trainable: TrainableRows | TrainableModel
    if spec.method == "full":
        trainable = TrainableModel(base, max_length=MAX_LENGTH, library=library)
    else:
        start, taken_off = initial_weights(spec.lora, base, spec.training.seed)
        trainable = trainable_rows(
            base, start, taken_off, max_length=MAX_LENGTH, dropout=spec.lora.dropout, library=library
        )
    trainer = Trainer(trainable, examples, spec.training)
    steps = []
    while trainer.step < trainer.total_steps:
        steps.append(trainer.run_step())
        if trainer.step % 25 == 0 or trainer.step == trainer.total_steps:
            say(f"{spec.name}: step {trainer.step} of {trainer.total_steps}, loss {steps[-1].loss:.3f}")
    return Trained(trainable, tuple(steps))


@torch.no_grad()
def classify(base: BaseModel, model: SmolLM, adapters: Adapters, sentences: Sequence[Rated]) -> list[bool]:
    """Classify each sentence by the label with the greater log-probability after its prompt.

    Both labels are one token each, so one pass over the prompts scores both.
    """
    encoder = PromptEncoder(base.tokenizer)
    labels = [encoder.continuation(label) for label in LABELS]
    assert all(len(label) == 1 for label in labels), "a label of several tokens"
    heads = torch.tensor([label[0] for label in labels])
    prompts = [encoder.prompt(prompt_of(sentence)) for sentence in sentences]
    found = [False] * len(prompts)
    for members in pack([len(prompt) for prompt in prompts], MAX_TOKENS):
        batch = [prompts[index] for index in members]
        attention = PackedAttention([len(prompt) for prompt in batch], base.device)
        token_ids = torch.tensor([token for prompt in batch for token in prompt])
        hidden = model.forward(token_ids, attention.positions, attention, adapters)
        last = torch.tensor([len(prompt) for prompt in batch]).cumsum(0) - 1
        logits = model.logits(hidden[last])[:, heads]  # (prompts, 2); both labels share a denominator
        for index, is_positive in zip(members, (logits[:, 1] > logits[:, 0]).tolist(), strict=True):
            found[index] = is_positive
    return found


def score(found: Sequence[bool], sentences: Sequence[Rated]) -> Score:
    """Score the answers. A label that occurs neither in answers nor in ratings is left out of the mean."""
    pairs = [(answer, sentence.is_positive) for answer, sentence in zip(found, sentences, strict=True)]
    f1 = []
    for label in (False, True):
        right = sum(answer == truth == label for answer, truth in pairs)
        named = sum((answer == label) + (truth == label) for answer, truth in pairs)
        if named:
            f1.append(2 * right / named)
    return Score(sum(answer == truth for answer, truth in pairs) / len(pairs), sum(f1) / len(f1))


def blend(parts: Sequence[LoraWeights], weight: float) -> LoraWeights:
    """Return weight · (sum of the adapters) exactly, as one adapter with concatenated ranks."""
    keys = {key for part in parts for key in part.modules}
    modules = {}
    for key in sorted(keys):
        found = [part.modules[key] for part in parts if key in part.modules]
        a = torch.cat([module.a for module in found])
        b = torch.cat([module.b * (weight * module.scaling) for module in found], 1)
        modules[key] = LoraModule(a, b, 1.0)
    return LoraWeights(modules)
