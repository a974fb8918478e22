"""Whole conversations as tokens, and the assistant's share of them, compared with transformers' own mask."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapters.errors import InvalidInput
from server.model.base.checkpoint import read_tokenizer
from server.model.text.chat import ChatMessage, PromptEncoder
from tests.kits.oracles.hugging_face import decoded, templated
from tests.kits.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, own, tiny_tokenizer

IM_START, IM_END = 1, 2
ENDS = frozenset({IM_END})

MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
"""CHAT_TEMPLATE with transformers' marks around the assistant's text."""

PIECES = st.sampled_from(
    ["a", " ", "\n", "Not Found", "404", "🦜", "é", "日本", "\t", ".", "<", "|im_end|>", "\0"]
)
LOOKALIKES = st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n", "<filename>", "\U00100000"])
WORDS = st.lists(PIECES, max_size=6).map("".join).filter(lambda text: "<|im_end|>" not in text)
ANYTHING = st.lists(st.one_of(PIECES, LOOKALIKES), max_size=6).map("".join)


def conversations(contents: st.SearchStrategy[str]) -> st.SearchStrategy[list[ChatMessage]]:
    role = st.sampled_from(["system", "user", "assistant", "assistant"])
    return st.lists(st.builds(ChatMessage, role, contents), min_size=1, max_size=5)


def documents(messages: list[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in messages]


def said(messages: list[ChatMessage]) -> list[str]:
    return [turn.content for turn in messages if turn.role == "assistant"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    return PromptEncoder(own(tokenizer))


def own_mask(tokenizer: PreTrainedTokenizerBase, messages: list[ChatMessage]) -> tuple[list[int], list[int]]:
    """Return (ids, transformers' mask of the assistant's tokens)."""
    found = templated(tokenizer, documents(messages), chat_template=MARKED, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


def mask(ids: list[int], turns: list[range]) -> list[int]:
    return [int(any(place in turn for turn in turns)) for place in range(len(ids))]


def check_against_transformers(tokenizer: PreTrainedTokenizerBase, messages: list[ChatMessage]) -> None:
    ids, turns = PromptEncoder(own(tokenizer)).conversation(messages, ENDS)
    assert (ids, mask(ids, turns)) == own_mask(tokenizer, messages)
    assert ids == templated(tokenizer, documents(messages))["input_ids"]
    assert len(turns) == len(said(messages))


def check_turns(tokenizer: PreTrainedTokenizerBase, encoder: PromptEncoder, messages: list[ChatMessage]) -> None:
    """Check that each turn is its text and the end token, with any texts, and that nothing is lost or added."""
    ids, turns = encoder.conversation(messages, ENDS)
    assert decoded(tokenizer, ids) == tokenizer.apply_chat_template(documents(messages), tokenize=False)
    assert [decoded(tokenizer, ids[turn.start : turn.stop]) for turn in turns] == [
        text + "<|im_end|>" for text in said(messages)
    ]
    assert [ids[turn.stop - 1] for turn in turns] == [IM_END] * len(turns)
    header = [IM_START, *encoder.continuation("assistant\n")]
    assert all(ids[turn.start - len(header) : turn.start] == header for turn in turns)
    num_turns = len(messages) + (messages[0].role != "system")
    assert [ids.count(IM_START), ids.count(IM_END)] == [num_turns, num_turns]


@given(messages=conversations(WORDS.map(lambda text: text.lstrip())))
def test_ids_and_mask_are_transformers_own(
    tokenizer: PreTrainedTokenizerBase, messages: list[ChatMessage]
) -> None:
    check_against_transformers(tokenizer, messages)


@given(messages=conversations(ANYTHING))
def test_turns_are_exact_for_any_texts(
    tokenizer: PreTrainedTokenizerBase, encoder: PromptEncoder, messages: list[ChatMessage]
) -> None:
    check_turns(tokenizer, encoder, messages)


@given(messages=conversations(ANYTHING), last=ANYTHING)
def test_text_before_the_last_turn_equals_generates_prompt(
    encoder: PromptEncoder, messages: list[ChatMessage], last: str
) -> None:
    messages = [ChatMessage(m.role, m.content.lstrip() if m.role == "assistant" else m.content) for m in messages]
    ids, turns = encoder.conversation([*messages, ChatMessage("assistant", last)], ENDS)
    assert ids[: turns[-1].start] == list(encoder.messages(messages))
    assert ids[turns[-1].start : turns[-1].stop - 1] == list(encoder.continuation(last))


@pytest.mark.real
def test_the_real_base(base_dir: Path) -> None:
    tokenizer = read_tokenizer(base_dir)
    encoder = PromptEncoder(own(tokenizer))
    messages = [
        ChatMessage("user", "What is 2 + 2?"),
        ChatMessage("assistant", "4. Ünï 日本語 🦜"),
        ChatMessage("user", "And 404?\n"),
        ChatMessage("assistant", "Not Found"),
    ]
    check_against_transformers(tokenizer, messages)
    check_against_transformers(tokenizer, [ChatMessage("system", "Be brief."), *messages])
    hard = [ChatMessage("user", "x<|im_end|>"), ChatMessage("assistant", "\n\n <|im_end|>y"), *messages]
    check_turns(tokenizer, encoder, hard)
    # "\n\n" is one token, which would cross the header's end.
    ids, (turn,) = encoder.conversation([ChatMessage("assistant", "\n\nOK")], ENDS)
    assert ids[turn.start : turn.stop] == [*encoder.continuation("\n\nOK"), IM_END]


def with_template(template: str, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    found = tokenizer or tiny_tokenizer()
    found.chat_template = template
    return found


def turns_of(template: str, messages: list[ChatMessage]) -> tuple[str, list[str]]:
    """Return (the whole conversation decoded, each of the assistant's turns decoded)."""
    tokenizer = with_template(template)
    ids, turns = PromptEncoder(own(tokenizer)).conversation(messages, ENDS)
    return decoded(tokenizer, ids), [decoded(tokenizer, ids[turn.start : turn.stop]) for turn in turns]


TWO = [
    ChatMessage("user", " 404 "),
    ChatMessage("assistant", "\n\n Not Found \n"),
    ChatMessage("user", "<|im_end|> "),
    ChatMessage("assistant", " <|im_end|>\n"),
]

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
THINKING = (
    HEAD + "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n' + m.content.lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            HEAD + "{{ m.content | trim + '<|im_end|>\n' }}{% endfor %}",
            ["Not Found<|im_end|>", "<|im_end|><|im_end|>"],
        ),
        (
            HEAD + "\n{{ m.content.rstrip() }}<|im_end|>{% endfor %}",
            ["\n\n Not Found<|im_end|>", " <|im_end|><|im_end|>"],
        ),
        (THINKING, [" Not Found \n<|im_end|>", " <|im_end|>\n<|im_end|>"]),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content.strip() + ' <|im_end|>' }}{% endif %}{% endfor %}",
            ["Not Found <|im_end|>", "<|im_end|> <|im_end|>"],
        ),
        (  # no end token, and an end token other than the model's
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
            ["\n\n Not Found \n", " <|im_end|>\n"],
        ),
        (HEAD + "{{ m.content + '<|endoftext|>' }}{% endfor %}", ["\n\n Not Found \n", " <|im_end|>\n"]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["\n\n Not Found \n", " <|im_end|>\n"]),
    ],
)
def test_other_templates(template: str, expected: list[str]) -> None:
    whole, turns = turns_of(template, TWO)
    assert turns == expected
    assert whole == with_template(template).apply_chat_template(documents(TWO), tokenize=False)


@pytest.mark.parametrize(
    "template",
    [
        HEAD + "{{ m.content | upper + '<|im_end|>' }}{% endfor %}",
        HEAD + "{{ m.content.replace('Found', '') }}{% endfor %}",
        HEAD + "{{ m.content.split('</think>')[-1] + m.content }}{% endfor %}",
        "{{ messages[0].content }}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        HEAD + "{{ m.content + ('!' if 'Found' in m.content else '') }}{% endfor %}",
        HEAD + "{{ m.content | length }}{% endfor %}",
    ],
)
def test_a_template_that_rewrites_is_refused(template: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        turns_of(template, TWO)
    assert caught.value.errors[0].loc == ("messages",)
    assert "Found" not in str(caught.value)


def metaspace_tokenizer(scheme: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer that marks the beginnings of words, like Llama's: only of the text, or of every piece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIAL_TOKENS, "<unk>"], show_progress=False, initial_alphabet=["\n"]
    )
    backend.train_from_iterator(["system user assistant Not Found. And? It is fine, thank you, OK\n"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
def test_tokenizers_that_mark_words(scheme: str) -> None:
    tokenizer = metaspace_tokenizer(scheme)
    messages = [ChatMessage("user", "fine?"), ChatMessage("assistant", "It is fine"), ChatMessage("user", "And?")]
    check_against_transformers(tokenizer, messages)
    check_against_transformers(tokenizer, [*messages, ChatMessage("assistant", "OK, thank you")])


def test_trimmed_offsets_do_not_hide_a_border() -> None:
    """ "  " is one token of this tokenizer, which would cross the header's end."""
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    backend["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    backend["model"]["merges"].insert(0, ["Ġ", "Ġ"])
    backend["model"]["vocab"]["ĠĠ"] = len(backend["model"]["vocab"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        chat_template="{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
    )
    encoder = PromptEncoder(own(tokenizer))
    assert len(encoder.continuation(":   OK")) < len(encoder.continuation(": ")) + len(
        encoder.continuation("  OK")
    )
    ids, (turn,) = encoder.conversation([ChatMessage("assistant", "  OK")], ENDS)
    assert ids[turn.start :] == list(encoder.continuation("  OK"))
    assert ids[: turn.start] == list(encoder.continuation("assistant: "))


def test_many_turns_with_a_cut_each_take_a_moment(encoder: PromptEncoder) -> None:
    filler = "a b " * 120
    messages = [ChatMessage("assistant" if i % 2 else "user", "\n\n" + filler) for i in range(1024)]
    started = time.perf_counter()
    _, turns = encoder.conversation(messages, ENDS)
    assert len(turns) == 512
    assert time.perf_counter() - started < 10


def test_a_base_without_a_template_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InvalidInput, match="no chat template"):
        PromptEncoder(own(bare)).conversation([ChatMessage("assistant", "hi")], ENDS)
