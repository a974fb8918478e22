"""JSON on the wire: only values that JSON supports."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.api import wire

texts = st.text() | st.sampled_from(["NaN", "-Infinity", "a\nb", "\x7f\u2028\ufffd"])
values = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | texts
documents = st.recursive(
    values.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
)


@given(documents)
def test_encoded_json_parses_back(document: object) -> None:
    encoded = wire.encode(document)
    assert json.loads(encoded) == document
    assert b"\n" not in encoded


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_lacks_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        wire.encode({"logprob": [number]})


def test_an_event_is_one_line_of_data() -> None:
    assert wire.event({"text": "a\nNaN", "ids": (1, 2)}, "delta") == (
        b'event: delta\ndata: {"text":"a\\nNaN","ids":[1,2]}\n\n'
    )


@given(documents)
@example("x\u2028y\u2029z\x85\r\n\x0b\x1c")
def test_event_is_one_line_for_any_reader(document: object) -> None:
    """httpx's `iter_lines`, with which our own client reads streams, also splits at Unicode's line ends."""
    (line, end) = wire.event(document).decode().splitlines()
    assert end == ""
    assert json.loads(line.removeprefix("data: ")) == document
