"""Log-probabilities cover exactly the tokens of the text, whatever its pieces and its end."""

from itertools import accumulate
from typing import cast

from hypothesis import example, given
from hypothesis import strategies as st

from server.api.openai.logprobs import LegacyLogprobs, TextLogprobs, of_chat
from server.engine.request import FinishReason, SampledLogprob, SequenceOutput, TokenLogprob

INFINITY = float("inf")


def entry(content: bytes, *rivals: TokenLogprob, name: str | None = None, logprob: float = -1.0) -> SampledLogprob:
    text = content.decode(errors="replace") if name is None else name
    return SampledLogprob(TokenLogprob(1, text, tuple(content), logprob), rivals)


def output(text: str, *entries: SampledLogprob, end: FinishReason | None = None) -> SequenceOutput:
    return SequenceOutput("1", 0, text, len(entries), 0, 0, entries, finish_reason=end)


def pushed(outputs: list[SequenceOutput]) -> list[list[bytes]]:
    tracker = TextLogprobs()
    return [[bytes(found.chosen.bytes) for found in tracker.push(one)] for one in outputs]


def test_token_is_in_the_piece_that_it_begins_in() -> None:
    assert pushed([output("a", entry(b"a")), output("bc", entry(b"bc"), end="length")]) == [[b"a"], [b"bc"]]


def test_tokens_of_withheld_text_are_withheld() -> None:
    # "EN" may begin the stop string "END"; "x" decides that it doesn't.
    pieces = [output("a", entry(b"aEN")), output("", entry(b"E")), output("ENE", entry(b"x"))]
    assert pushed(pieces) == [[b"aEN"], [], [b"E"]]


def test_stop_string_and_end_token_are_left_out() -> None:
    # The text ends before "END"; the token "aE" begins within the text.
    assert pushed([output("a", entry(b"aE")), output("", entry(b"N")), output("", entry(b"D"), end="stop")]) == [
        [b"aE"],
        [],
        [],
    ]
    assert pushed([output("a", entry(b"a")), output("", entry(b"", name="<|im_end|>"), end="stop")]) == [
        [b"a"],
        [],
    ]


def test_nothing_is_left_out_at_the_token_limit() -> None:
    # An incomplete character at the end, and a special token that ignore_eos let pass.
    pieces = [output("", entry(b"", name="<|im_end|>")), output("\ufffd", entry(b"\xc3"), end="length")]
    assert [found for piece in pushed(pieces) for found in piece] == [b"", b"\xc3"]


def test_character_of_several_tokens() -> None:
    pieces = [output("", entry(b"\xc3")), output("é", entry(b"\xa9")), output("", entry(b""), end="stop")]
    assert pushed(pieces) == [[], [b"\xc3", b"\xa9"], []]


def test_invalid_bytes() -> None:
    """U+FFFD is longer than the bytes it replaces. Later tokens don't belong to the text because of that."""
    end = entry(b"", name="<|im_end|>")
    ended = [output("", entry(b"\xc3")), output("\ufffda", entry(b"a")), output("", end, end="stop")]
    assert pushed(ended) == [[], [b"\xc3", b"a"], []]
    stopped = [output("", entry(b"\xe2\x82")), output("\ufffd", entry(b"EN")), output("", entry(b"D"), end="stop")]
    assert pushed(stopped) == [[], [b"\xe2\x82"], []]
    unfinished = [output("", entry(b"\xc3")), output("\ufffd", end, end="stop")]
    assert pushed(unfinished) == [[], [b"\xc3"]]


@example([b"\xed", b"\xa0"])
@given(st.lists(st.binary(min_size=1, max_size=4), max_size=12))
def test_text_offset_is_the_character_of_the_first_byte(tokens: list[bytes]) -> None:
    content, ends = b"".join(tokens), accumulate(map(len, tokens), initial=0)
    places = [len(content[: end + 1].decode(errors="replace")) - 1 for end in ends]
    assert LegacyLogprobs(0).of([entry(token) for token in tokens])["text_offset"] == places[:-1]


def test_completions_form() -> None:
    form = LegacyLogprobs(1)
    rival = TokenLogprob(2, "x", (0x78,), -INFINITY)
    first = form.of([entry(b"\xc3", rival), entry(b"\xa9a", logprob=-0.5)])
    assert first == {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9a"[:10] + "\\x61"],
        "token_logprobs": [-1.0, -0.5],
        "top_logprobs": [{"x": -9999.0, "bytes:\\xc3": -1.0}, {"bytes:\\xa9\\x61": -0.5}],
        "text_offset": [0, 0],
    }
    assert form.of([entry(b"b")])["text_offset"] == [2]
    assert LegacyLogprobs(0).of([entry(b"b", rival)])["top_logprobs"] is None


def test_chat_form() -> None:
    rival = TokenLogprob(2, "x", (0x78,), -2.0)
    (found,) = cast("list[object]", of_chat([entry(b"\xc3", rival, rival)], 1)["content"])
    assert found == {
        "token": "\ufffd",
        "bytes": [0xC3],
        "logprob": -1.0,
        "top_logprobs": [{"token": "x", "bytes": [0x78], "logprob": -2.0}],
    }
