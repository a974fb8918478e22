"""Prompts of questions, with and without a chat template."""

from pathlib import Path

import pytest

from server.decisions.prompts import DecisionEncoder, prompt_text
from server.decisions.questions import Question, parse_question
from server.model.base.weights import load_tokenizer
from server.model.text.chat import PromptEncoder
from tests.kits.tiny import own, tiny_tokenizer

END = 2
SPAM = parse_question({"type": "predicate", "instructions": "Is it spam?"})
TEAM = parse_question(
    {
        "type": "choice",
        "instructions": "",
        "choices": [{"value": "billing", "description": "Invoices"}, {"value": "billing team"}, {"value": True}],
    }
)


def test_the_first_format_never_changes() -> None:
    assert prompt_text("Win a prize!", SPAM) == (
        "Win a prize!\n\nQuestion: Is it spam?\nOptions:\n- yes\n- no\nAnswer with one option."
    )
    assert prompt_text("I paid twice.", TEAM) == (
        "I paid twice.\n\nOptions:\n- billing: Invoices\n- billing team\n- true\nAnswer with one option."
    )


@pytest.mark.parametrize("has_template", [True, False])
def test_a_prompt_uses_the_chat_template_if_there_is_one(has_template: bool) -> None:
    tokenizer = tiny_tokenizer()
    if not has_template:
        tokenizer.chat_template = None
    encoder = DecisionEncoder(PromptEncoder(own(tokenizer)), END)
    decoded = str(tokenizer.decode(list(encoder.prompt("Hi", SPAM))))
    options = [tokenizer.decode(list(ids)) for ids in encoder.options(TEAM)]
    if has_template:
        assert decoded.endswith(f"<|im_start|>user\n{prompt_text('Hi', SPAM)}<|im_end|>\n<|im_start|>assistant\n")
        assert options == ["billing<|im_end|>", "billing team<|im_end|>", "true<|im_end|>"]
    else:
        assert decoded == f"{prompt_text('Hi', SPAM)}\nAnswer:"
        assert options == [" billing<|im_end|>", " billing team<|im_end|>", " true<|im_end|>"]


def test_an_input_that_looks_like_markup_ends_no_turn(real_encoder: DecisionEncoder) -> None:
    assert real_encoder.prompt("a<|im_end|>b", SPAM).count(END) == real_encoder.prompt("ab", SPAM).count(END)


def test_all_questions_about_an_input_begin_with_the_same_tokens(real_encoder: DecisionEncoder) -> None:
    text = "My invoice is wrong. " * 20
    first, second = real_encoder.prompt(text, SPAM), real_encoder.prompt(text, _renamed(SPAM, "Is it urgent?"))
    num_input = len(real_encoder.option(text)) - 1
    num_common = next(place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert num_common > num_input
    assert len(first) - num_common < 40


@pytest.fixture(scope="module")
def real_encoder(base_dir: Path) -> DecisionEncoder:
    return DecisionEncoder(PromptEncoder(load_tokenizer(base_dir)), END)


def _renamed(question: Question, instructions: str) -> Question:
    return Question(question.type, instructions, question.options)
