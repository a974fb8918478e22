"""Text pieces against the tokenizer's decoding, and stop strings against a search in the whole text."""

# ruff: noqa: RUF001
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from server.engine.detokenizer import TextStream, TokenBytes, _byte_characters
from server.model.base.checkpoint import read_tokenizer
from tests.kits.engines import token_bytes
from tests.kits.oracles.hugging_face import decoded
from tests.kits.properties import num_examples
from tests.kits.tiny import own, tiny_tokenizer

TEXTS = [
    "Grüße aus Köln – für 5 € 🙂👩‍👩‍👧 und 日本語のテキスト, naïve café, \u200b\ufeff zero width",
    "def f(x):\n\treturn  x ** 2   # spaces  \n\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﷽ \U0010ffff 1234567890",
]


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def real(base_dir: Path) -> PreTrainedTokenizerBase:
    return read_tokenizer(base_dir)


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.real)])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def tokens(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    return token_bytes(own(tokenizer))


def pieces(tokens: TokenBytes, token_ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """Return the text after each token, and at the end."""
    stream = TextStream(tokens, stop)
    return [*(stream.push(token_id) for token_id in token_ids), stream.finish()]


def test_random_tokens(tokenizer: PreTrainedTokenizerBase, tokens: TokenBytes) -> None:
    """Mostly broken UTF-8 and special tokens: still exactly the tokenizer's text."""
    rng = random.Random(0)
    bytes_alone = [i for i in range(len(tokenizer)) if len(tokens.bytes_of(i)) == 1]
    assert len(bytes_alone) > 200
    num_broken = 0
    for trial in range(300):
        source = bytes_alone if trial % 2 else range(len(tokenizer))
        token_ids = rng.choices(source, k=rng.randint(0, 60)) + rng.choices(tokenizer.all_special_ids, k=3)
        rng.shuffle(token_ids)
        text = decoded(tokenizer, token_ids, skip_special_tokens=True)
        assert "".join(pieces(tokens, token_ids)) == text
        num_broken += "\ufffd" in text
    assert num_broken > 100


def test_every_token(tokenizer: PreTrainedTokenizerBase, tokens: TokenBytes) -> None:
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert special == set(range(17))
    for token_id in range(len(tokenizer)):
        text = decoded(tokenizer, [token_id], skip_special_tokens=True)
        assert tokens.bytes_of(token_id).decode(errors="replace") == text
        if token_id in special:
            assert text == ""
            assert tokens.name_of(token_id) == tokenizer.convert_ids_to_tokens(token_id)
        else:
            assert tokens.name_of(token_id) == text


def test_an_unknown_token_adds_nothing(tokens: TokenBytes) -> None:
    assert tokens.bytes_of(10**6) == b""


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_returned_as_soon_as_they_are_complete(
    tokenizer: PreTrainedTokenizerBase, tokens: TokenBytes, text: str
) -> None:
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokens, token_ids)
    assert "".join(found) == decoded(tokenizer, token_ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(found)
    so_far = b""
    for i, token_id in enumerate(token_ids):
        so_far += tokens.bytes_of(token_id)
        shown = "".join(found[: i + 1]).encode()
        assert so_far.startswith(shown)
        assert len(so_far) - len(shown) < 4
        missing = so_far[len(shown) :]
        assert not missing or missing[0] >= 0xC0, "a whole character was held back"


ALPHABET = ("a", "b", "ab", "ba", "aab", "é", "€a", " ")
HALVES = (
    b"\xc3",
    b"\xa9",
    b"\xe2\x82",
    b"\xac",
    b"\xff",
    b"",
)  # é and € in parts, and bytes that are no character
_CHARACTERS = _byte_characters()
PIECES = TokenBytes(
    {
        "".join(_CHARACTERS[byte] for byte in piece): i
        for i, piece in enumerate([*(text.encode() for text in ALPHABET), *HALVES])
        if piece
    },
    {},
    [],
)
NUM_PIECES = len(ALPHABET) + len(HALVES)


def reference(token_ids: Sequence[int], stop: Sequence[str]) -> tuple[str, bool, int]:
    """Return the text, whether a stop string ended it, and after how many tokens: by a full search."""
    data = b""
    for count, token_id in enumerate(token_ids, 1):
        data += PIECES.bytes_of(token_id)
        text = data.decode(errors="replace")
        whole = text if data.decode(errors="ignore") == text else decided(data)
        found = [at for at in (whole.find(one) for one in stop) if at >= 0]
        if found:
            return whole[: min(found)], True, count
    text = data.decode(errors="replace")
    found = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(found)] if found else text, bool(found), len(token_ids)


def decided(data: bytes) -> str:
    """Return the characters of `data` that no further byte can change."""
    texts = {
        (data + tail).decode(errors="replace") for tail in (b"", b"a", b"\xa9", b"\x82", b"\xac", b"\x82\xac")
    }
    first, *rest = texts
    end = next((i for i in range(len(first)) if any(text[i : i + 1] != first[i] for text in rest)), len(first))
    return first[:end]


stops = st.lists(st.text("ab é€\ufffd", min_size=1, max_size=4), max_size=3)


@settings(deadline=None, max_examples=num_examples(400))
@given(st.lists(st.integers(0, NUM_PIECES - 1), max_size=25), stops)
@example([0, 1, 0, 1, 0, 0], ["abab", "baa"])  # overlapping, one within the other
@example([4, 4, 4], ["aaba", "aab"])
@example([8, 9, 0], ["é"])
@example([0, 8], ["a\ufffd"])
def test_stop_strings(token_ids: list[int], stop: list[str]) -> None:
    text, stopped, count = reference(token_ids, stop)
    stream = TextStream(PIECES, stop)
    found = ""
    for i, token_id in enumerate(token_ids, 1):
        found += stream.push(token_id)
        assert text.startswith(found), "something was sent that is no part of the text"
        assert stream.stopped is (stopped and i >= count and (count < len(token_ids) or at_once(token_ids, stop)))
    found += stream.finish()
    assert found == text
    assert stream.stopped is stopped
    assert stream.finish() == ""


def at_once(token_ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Return whether the last token decides the outcome, rather than the end, which turns half a character into
    U+FFFD."""
    data = b"".join(PIECES.bytes_of(token_id) for token_id in token_ids)
    return any(one in decided(data) for one in stop)


def test_the_earliest_stop_wins() -> None:
    assert pieces(PIECES, [0, 1, 3], ["bb", "abb"])[:3] == ["", "", ""]
    assert pieces(PIECES, [4, 1], ["b", "aab"]) == [
        "",
        "",
        "",
    ]  # both end with the same token: the longer begins first
    assert pieces(PIECES, [0, 0, 1], ["b", "aaa"]) == ["", "", "aa", ""]


def test_a_possible_stop_string_is_kept_back_only_while_undecided() -> None:
    assert pieces(PIECES, [0, 1, 0, 7, 0], ["abb"]) == ["", "", "ab", "a ", "", "a"]


def test_no_text_follows_a_stop_string() -> None:
    stream = TextStream(PIECES, ["b"])
    assert [stream.push(0), stream.push(1), stream.push(0), stream.finish()] == ["a", "", "", ""]
    assert stream.stopped


def test_a_stop_string_inside_a_characters_bytes_does_not_match() -> None:
    assert "".join(pieces(PIECES, [8, 9], ["\ufffd"])) == "é"
    assert "".join(pieces(PIECES, [8], ["\ufffd"])) == ""


@given(st.text("ab", max_size=12), st.integers(0, 12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_that_end_early_do_not_count(text: str, min_tokens: int, stop: list[str]) -> None:
    """The text ends before the first stop string that ends after the first `min_tokens` tokens."""
    tokens = TokenBytes({"a": 0, "b": 1}, {}, ())
    stream = TextStream(tokens, stop, min_tokens)
    found = "".join([*(stream.push("ab".index(character)) for character in text), stream.finish()])
    # the text with the fewest tokens in which a stop string ends, and the first of these strings
    ends = (
        (end, text[:end].rfind(one, 0, end))
        for end in range(min_tokens + 1, len(text) + 1)
        for one in stop
        if text[:end].endswith(one)
    )
    first_end = min((end for end, _ in ends), default=None)
    if first_end is None:
        assert (found, stream.stopped) == (text, False)
    else:
        longest = max(len(one) for one in stop if text[:first_end].endswith(one))
        assert (found, stream.stopped) == (text[: first_end - longest], True)
