"""A base's tokenizer compared with transformers' reading of the same directories, before and after conversion."""

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from server.errors import StartupError
from server.model.base.checkpoint import read_tokenizer
from server.model.base.source import resolve_base
from server.model.base.weights import load_base, load_tokenizer
from server.model.text.tokenizer import BaseTokenizer, tokenizer_json, vocabulary_of
from tests.kits.oracles.hugging_face import decoded
from tests.kits.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, own, save_tiny_base, tiny_tokenizer

TEXTS = [
    *("", " ", "\n\n  x", "Café déjà vu. 12 345,67", "naïve\u0301 e\u0301 \ufeff x\u200b", "\x00\x7f\ud7ff"),
    *("日本語 한국어", "🙂👩\u200d👩\u200d👧"),
    *("<|im_start|>user\nhi<|im_end|>", "a<|im_end|> <|endoftext|>b", "don't   can't'S", "\t if x:\r\n\treturn"),
    *SPECIAL_TOKENS,
]
LOOKALIKES = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, " ", "  ", "\n", "12", "é", "<|", "user"]) | st.text()
).map("".join)
MESSAGES = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": " 12 "}]


def check(found: BaseTokenizer, expected: PreTrainedTokenizerBase, text: str) -> None:
    """Check that both have the same ids of `text`, and the same texts of these ids."""
    for add_special_tokens in (True, False):
        ids = found.encode(text, add_special_tokens=add_special_tokens)
        assert ids == expected(text, add_special_tokens=add_special_tokens)["input_ids"]
        assert found.decode(ids) == decoded(expected, ids)
        assert found.decode(ids, skip_special_tokens=True) == decoded(expected, ids, skip_special_tokens=True)


def check_all(found: BaseTokenizer, expected: PreTrainedTokenizerBase) -> None:
    """Check that both tokenizers are equal, with the same names and template."""
    backend = Tokenizer.from_str(expected.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    assert json.loads(tokenizer_json(found)) == json.loads(backend.to_str())
    vocabulary, added, special = vocabulary_of(found)
    assert vocabulary == expected.get_vocab()
    assert added == {number: token.content for number, token in expected.added_tokens_decoder.items()}
    assert special == [number for number, token in expected.added_tokens_decoder.items() if token.special]
    assert (len(found), found.eos_token_id) == (len(expected), expected.eos_token_id)
    assert (found.chat_template is None) == (expected.chat_template is None)
    if found.chat_template is not None:
        for asks in (True, False):
            text = expected.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=asks)
            assert found.chat_template.render(MESSAGES, add_generation_prompt=asks) == text
    for text in TEXTS:
        check(found, expected, text)


@cache
def both(directory: Path) -> tuple[BaseTokenizer, PreTrainedTokenizerBase]:
    return load_tokenizer(directory), read_tokenizer(directory)


@given(text=st.text() | LOOKALIKES)
def test_any_text(text: str) -> None:
    expected = _tiny()
    check(own(expected), expected, text)


@cache
def _tiny() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.mark.real
def test_the_real_one(base_dir: Path) -> None:
    check_all(*both(base_dir))


@pytest.mark.real
@given(text=st.text() | LOOKALIKES)
def test_any_text_by_the_real_one(base_dir: Path, text: str) -> None:
    check(*both(base_dir), text)


@pytest.mark.real
def test_any_ids_by_the_real_one(base_dir: Path) -> None:
    """Includes broken characters and special tokens."""
    found, expected = both(base_dir)
    rng = random.Random(0)
    for _ in range(200):
        ids = rng.choices(range(len(found)), k=rng.randint(0, 40)) + rng.choices(range(17), k=3)
        rng.shuffle(ids)
        for skip in (False, True):
            assert found.decode(ids, skip_special_tokens=skip) == decoded(expected, ids, skip_special_tokens=skip)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chat_template": None},
        {"eos_token": None},
        {"eos_token": "<new end>"},
        {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": True, "special": True}},
        {"add_bos_token": True, "add_eos_token": True},
        {"split_special_tokens": True},
        {"additional_special_tokens": ["<a>", "<b>"]},
        {"extra_special_tokens": {"image": "<image>"}},
        {"image_token": "<image>", "boi_token": "<|im_start|>"},
        {"clean_up_tokenization_spaces": True},
        {"padding_side": "left", "truncation_side": "left", "model_max_length": 3},
        {"added_tokens_decoder": {"511": {"content": "<own>", "special": False}}},
        {"chat_template": [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "other", "template": "no"}]},
        {"chat_template": CHAT_TEMPLATE + "{{ image }}{{ image_token }}{{ eos_token }}", "image_token": "<image>"},
    ],
    ids=lambda options: "-".join(options) or "as it is",
)
def test_tokenizer_directories(tmp_path: Path, options: Mapping[str, object]) -> None:
    """Converted, then read without transformers, it equals transformers' before and after."""
    save_tiny_base(tmp_path / "base", options={"vocab_size": 600})
    config = tmp_path / "base" / "tokenizer_config.json"
    if "chat_template" in options:
        (tmp_path / "base" / "chat_template.jinja").unlink()
    said = json.loads(config.read_text()) | dict(options)
    config.write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    converted = resolve_base(str(tmp_path / "base"), tmp_path)
    for directory in (tmp_path / "base", converted):
        expected = read_tokenizer(directory)
        expected.split_special_tokens = False  # set for each, as prompts are encoded this way
        if isinstance(expected.chat_template, dict):
            expected.chat_template = expected.chat_template["default"]
        check_all(load_base(converted).tokenizer, expected)


def test_tokenizer_json_features(tmp_path: Path) -> None:
    """Padding, truncation, a normalizer, tokens that strip adjacent white space, a start token."""
    save_tiny_base(tmp_path / "base", options={"vocab_size": 600})
    backend = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    backend.enable_padding(length=8)
    backend.enable_truncation(4)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.add_tokens([AddedToken("<left>", lstrip=True), AddedToken("Word", single_word=True, normalized=True)])
    backend.add_special_tokens([AddedToken("<right>", rstrip=True)])
    backend.save(str(tmp_path / "base" / "tokenizer.json"))
    converted = resolve_base(str(tmp_path / "base"), tmp_path)
    found, expected = load_base(converted).tokenizer, read_tokenizer(tmp_path / "base")
    check_all(found, expected)
    for text in ("a <left> b <right> c", "Word Words word", "one two three four five six seven eight nine ten"):
        check(found, expected, text)
    assert len(found.encode("one two three four five six seven eight nine ten")) > 8


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "the tokenizer can't be read"),
        ("tokenizer.json", b"{}", "the tokenizer can't be read"),
        ("tokenizer_config.json", b"[]", "is not a JSON object"),
        ("chat_template.jinja", b"\xff", "the tokenizer can't be read"),
    ],
)
def test_a_broken_converted_base_says_so(
    tmp_path: Path, converted_tiny: Path, file: str, content: bytes | None, message: str
) -> None:
    for found in converted_tiny.iterdir():
        (tmp_path / found.name).symlink_to(found)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(StartupError, match=message):
        load_base(tmp_path)
