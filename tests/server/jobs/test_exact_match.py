"""Exact match against greedy completions by transformers' own `generate`."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from adapters.lora import LoraModule, LoraWeights
from server.jobs.scoring import MORE_TOKENS, _may_become
from server.model.base.weights import BaseModel, load_base
from server.model.smollm import NoAdapters
from server.model.text.chat import ChatMessage, PromptEncoder
from server.training.encoding import Reference, RowEncoder
from server.training.evaluate import evaluate
from server.training.rows import CompletionRow, MessagesRow, Row, TextRow
from tests.kits.engines import random_adapter
from tests.kits.native import native_library
from tests.kits.oracles.hugging_face import generate, linear, load_reference, merged
from tests.server.jobs.attempt_kit import exact_match
from tests.server.training.data.rows_kit import measured, model_of, pass_of, rows_of

PROMPTS = ("404", "The server", "Not", "OK")


def greedy(model: PreTrainedModel, base: BaseModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The new tokens that transformers generates, up to the end token and without it."""
    ends = base.config.eos_token_ids
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(ends), pad_token_id=0
    )
    ids = torch.tensor([list(prompt)])
    found = generate(model, input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    new: list[int] = found[0, len(prompt) :].tolist()
    return new[:-1] if new[-1] in ends else new


def text_of(base: BaseModel, token_ids: Sequence[int]) -> str:
    return str(base.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def references(
    base: BaseModel, reference: PreTrainedModel, encoder: RowEncoder
) -> tuple[list[Reference], list[bool]]:
    """References around what transformers generates, and whether it generates them within their lengths."""
    found: list[Reference] = []
    matches: list[bool] = []
    for prompt in PROMPTS:
        ids = PromptEncoder(base.tokenizer).prompt(prompt)
        generated = greedy(reference, base, ids, 60)  # of which a shorter run would be the beginning
        text = text_of(base, generated[:12])
        half = text[: len(text) // 2]
        for wanted in (text, f" \n{text}\t", text + "x", half, text[1:], "x" + text, text.strip()):
            row = encoder.reference(CompletionRow(prompt, wanted))
            assert row is not None
            for one in (row, replace(row, num_tokens=12 - MORE_TOKENS)):  # the second may end where 12 tokens do
                answer = text_of(base, generated[: one.num_tokens + MORE_TOKENS])
                found.append(one)
                matches.append(answer.strip() == one.text.strip())
    return found, matches


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_exact_match(with_adapter: bool, tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """Each reference by itself and all together, with completions that end by a token and by their length."""
    reference = load_reference(tiny_base_dir)
    weights = random_adapter(tiny_base.config.shape, 3, rank=4) if with_adapter else None
    with merged(reference, [] if weights is None else [(weights, 1.0)]):
        ids = PromptEncoder(tiny_base.tokenizer).prompt(PROMPTS[0])
        ends = {greedy(reference, tiny_base, ids, 12)[5], *tiny_base.config.eos_token_ids}
        base = replace(tiny_base, config=replace(tiny_base.config, eos_token_ids=tuple(sorted(ends))))
        encoder = RowEncoder(PromptEncoder(base.tokenizer), base.config.eos_token_ids[0])
        found, matches = references(base, reference, encoder)
    assert 0.2 < sum(matches) / len(matches) < 0.8
    assert exact_match(base, weights, found) == matches
    for is_match in (True, False):
        same = [one for one, matched in zip(found, matches, strict=True) if matched is is_match]
        assert exact_match(base, weights, same) == [is_match] * len(same)


def test_all_weights_trained(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """Full fine-tuning: another base of the same sizes, without an adapter."""
    first, second, *others = tiny_base.weights.layers
    changed = (first, replace(second, down=second.down * 0.5), *others)
    base = replace(tiny_base, weights=replace(tiny_base.weights, layers=changed))
    reference = load_reference(tiny_base_dir)
    before = greedy(reference, base, (404, 5), 12)
    linear(reference, "model.layers.1.mlp.down_proj").weight.mul_(0.5)
    assert greedy(reference, base, (404, 5), 12) != before
    encoder = RowEncoder(PromptEncoder(base.tokenizer), base.config.eos_token_ids[0])
    found, matches = references(base, reference, encoder)
    assert exact_match(base, None, found) == matches


def first_reference(base: BaseModel, hugging_face: Path, prompt: str, text: str | None = None) -> Reference:
    """Of a row with `text`, or with what transformers generates first."""
    if text is None:
        ids = PromptEncoder(base.tokenizer).prompt(prompt)
        text = text_of(base, greedy(load_reference(hugging_face), base, ids, 12))
    found = RowEncoder(PromptEncoder(base.tokenizer), 2).reference(CompletionRow(prompt, text))
    assert found is not None
    return found


def test_a_completion_is_given_up_once_it_cannot_match(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """A wrong first token ends it: not the reference's length later."""
    first = first_reference(tiny_base, tiny_base_dir, "404").text.strip()[0]
    wrong = first_reference(tiny_base, tiny_base_dir, "404", ("b" if first == "a" else "a") * 300)
    assert wrong.num_tokens > 100
    steps: list[None] = []
    assert exact_match(tiny_base, None, [wrong], yield_or_leave=lambda: steps.append(None)) == [False]
    assert 0 < len(steps) < 20


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ("", True),
        (" \n", True),
        ("  a", True),
        ("a b", True),
        ("\ta b c", True),
        ("a b c \n", True),
        ("a b c \nd", False),
        ("a b cd", False),
        ("a  b", False),
        ("b", False),
    ],
)
def test_what_may_still_become_the_reference(text: str, may: bool) -> None:
    """Space before and after it is no fault; in it, it is."""
    assert _may_become(text, "a b c") is may


def test_between_steps(tiny_base: BaseModel) -> None:
    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        exact_match(tiny_base, None, [Reference((3, 4, 5), "x", 1)], yield_or_leave=stop)


def test_no_references_and_no_room(tiny_base: BaseModel) -> None:
    assert exact_match(tiny_base, None, []) is None
    limit = tiny_base.config.max_position_embeddings
    full = [Reference((5,) * limit, "x", 1), Reference((5,) * (limit - 1), "x", 1)]
    assert exact_match(tiny_base, None, full) == [False, False]


ROWS: tuple[Row, ...] = (
    CompletionRow("The capital of France is", " Paris."),
    CompletionRow("2 + 2 =", " 4"),
    TextRow("The quick brown fox jumps over the lazy dog."),
    MessagesRow(
        (
            ChatMessage("user", "What is the capital of Italy?"),
            ChatMessage("assistant", "The capital of Italy is Rome."),
        )
    ),
)


@pytest.mark.real
@pytest.mark.thorough  # losses on a tiny base: loop/test_evaluate.py; matches on this one in native code: below
def test_on_the_real_base(real_base: BaseModel, hf_base_dir: Path) -> None:
    """Rows of all kinds under the base and an adapter; exact match on what the adapter really answers."""
    reference = load_reference(hf_base_dir)
    encoder = RowEncoder(PromptEncoder(real_base.tokenizer), real_base.config.eos_token_ids[0])
    examples = encoder.encode_all(ROWS, 128).examples
    model = model_of(real_base)
    tuned = random_adapter(real_base.config.shape, 0, rank=8, modules=["v_proj"], layers=[3, 20], strength=0.3)
    plain = evaluate(pass_of(model, NoAdapters()), examples)
    assert plain.loss == pytest.approx(measured(reference, examples)[0], abs=1e-4)
    found = evaluate(pass_of(model, rows_of(tuned, real_base)), examples)
    asked = encoder.references(ROWS)
    assert len(asked) == 3
    with merged(reference, [(tuned, 1.0)]):
        loss, accuracy, _ = measured(reference, examples)
        answers = [
            text_of(real_base, greedy(reference, real_base, one.prompt, one.num_tokens + MORE_TOKENS))
            for one in asked
        ]
    assert found.loss == pytest.approx(loss, abs=1e-4)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-6)
    assert abs(loss - plain.loss) > 1e-3
    answered = [replace(one, text=answer) for one, answer in zip(asked, answers, strict=True)]
    assert exact_match(real_base, tuned, answered) == [True] * 3
    matches = [one.text.strip() == answer.strip() for one, answer in zip(asked, answers, strict=True)]
    assert exact_match(real_base, tuned, asked) == matches


@pytest.fixture(scope="module")
def real_reference(hf_base_dir: Path) -> PreTrainedModel:
    return load_reference(hf_base_dir)


@pytest.fixture(scope="module")
def real_base_in_bf16(base_dir: Path) -> BaseModel:
    return load_base(base_dir, torch.bfloat16)


@pytest.mark.real
@pytest.mark.parametrize("with_adapter", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_exact_match_in_native_code(
    real_base_in_bf16: BaseModel, real_reference: PreTrainedModel, with_adapter: bool
) -> None:
    """On what the adapter answers in fp32, over its first tokens, and on what it doesn't."""
    library, base, reference = native_library(), real_base_in_bf16, real_reference
    encoder = RowEncoder(PromptEncoder(base.tokenizer), base.config.eos_token_ids[0])
    tuned = random_adapter(base.config.shape, 0, rank=8, modules=["v_proj"], layers=[3, 20], strength=0.3)
    asked = encoder.references(ROWS)
    with merged(reference, [(tuned, 1.0)] if with_adapter else []):
        texts = [text_of(base, greedy(reference, base, one.prompt, one.num_tokens + MORE_TOKENS)) for one in asked]
    answered = [replace(one, text=text) for one, text in zip(asked, texts, strict=True)]
    others = [replace(one, text=f"{text} no") for one, text in zip(asked, texts, strict=True)]
    weights = tuned if with_adapter else None
    matches = [True] * 3 + [False] * 3
    assert exact_match(base, weights, [*answered, *others], library=library) == matches


def test_exact_match_where_there_is_no_memory_for_native_code(
    tiny_base: BaseModel, tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*given: object, **named: object) -> None:
        raise MemoryError("no memory for the packed weights")

    monkeypatch.setattr("server.jobs.scoring.NativeModel", none_left)
    one = replace(first_reference(tiny_base, tiny_base_dir, "Not"), num_tokens=12 - MORE_TOKENS)
    with caplog.at_level("INFO"):
        found = exact_match(tiny_base, None, [one], library=ctypes.CDLL(None))
    assert found == exact_match(tiny_base, None, [one]) == [True]
    assert "no memory for the packed weights: torch completes" in caplog.text


def test_an_adapter_that_needs_too_much_memory(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One module's rank counts for all, since the engine's pools have as many rows for each."""
    weights = random_adapter(tiny_base.config.shape, 3, rank=40, modules=["q_proj"], layers=[0])
    features = tiny_base.config.shape.features.values()
    needed = 40 * tiny_base.config.num_layers * 4 * sum(outputs + inputs for outputs, inputs in features)
    one = Reference((3, 4, 5), "x", 1)
    monkeypatch.setattr("server.jobs.scoring.MAX_ADAPTER_BYTES", needed)
    assert exact_match(tiny_base, weights, [one]) is not None
    monkeypatch.setattr("server.jobs.scoring.MAX_ADAPTER_BYTES", needed - 1)
    assert exact_match(tiny_base, weights, [one]) is None
    assert "exact match isn't measured: an adapter of rank 40" in caplog.text
    assert exact_match(tiny_base, None, [one]) is not None


def test_which_adapter_it_is(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    """The engine knows adapters by their digests: one that does nothing isn't taken for one that does."""
    weights = random_adapter(tiny_base.config.shape, 3, rank=4)
    silent = LoraWeights({key: LoraModule(m.a, m.b, 0.0) for key, m in weights.modules.items()})
    one = replace(first_reference(tiny_base, tiny_base_dir, "Not"), num_tokens=12 - MORE_TOKENS)
    assert exact_match(tiny_base, weights, [one]) == [False]
    assert exact_match(tiny_base, silent, [one]) == [True]
