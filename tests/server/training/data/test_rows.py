"""Rows as they come from JSON: taken whole, or refused with the field's name and none of its text."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidInput
from server.model.text.chat import ChatMessage
from server.training.rows import (
    MAX_FAULTS,
    CanonicalRows,
    CompletionRow,
    MessagesRow,
    Row,
    RowNotes,
    TextRow,
    canonical_json,
    kind_of,
    parse_row,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
TURN = st.builds(ChatMessage, st.sampled_from(["system", "user", "assistant"]), TEXT)
ROWS: st.SearchStrategy[Row] = st.one_of(
    st.builds(CompletionRow, TEXT, TEXT),
    st.builds(TextRow, TEXT),
    st.builds(
        lambda turns, last, weights: conversation((*turns, ChatMessage("assistant", last)), weights),
        st.lists(TURN, max_size=4),
        TEXT,
        st.lists(st.integers(0, 1), min_size=5, max_size=5),
    ),
)


def conversation(messages: tuple[ChatMessage, ...], weights: list[int]) -> MessagesRow:
    """With those of the assistant's turns untrained whose weight is 0, unless all are."""
    own = MessagesRow(messages).assistant
    untrained = frozenset(place for place in own if not weights[place])
    return MessagesRow(messages, untrained if len(untrained) < len(own) else frozenset())


def faults(value: object) -> list[tuple[str | int, ...]]:
    with pytest.raises(InvalidInput) as caught:
        parse_row(value)
    return [error.loc for error in caught.value.errors]


def turns(*contents: object) -> dict[str, object]:
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def test_the_three_shapes() -> None:
    assert parse_row({"prompt": "200", "completion": "OK"}) == CompletionRow("200", "OK")
    assert parse_row({"text": "200 OK"}) == TextRow("200 OK")
    assert parse_row(turns("200", "OK")) == MessagesRow(
        (ChatMessage("user", "200"), ChatMessage("assistant", "OK"))
    )
    assert [kind_of(parse_row(row)) for row in ({"text": "a"}, turns("a", "b"))] == ["text", "messages"]
    assert kind_of(CompletionRow("a", "b")) == "completion"


def test_turns_of_the_assistant_may_be_read_alone() -> None:
    document = turns("200", "OK", "404", "Not Found", "500", "Oh")
    plain = parse_row(document)
    messages = document["messages"]
    assert isinstance(plain, MessagesRow)
    assert isinstance(messages, list)
    messages[1]["weight"] = 0
    messages[3]["weight"] = 1
    weighted = parse_row(document)
    assert weighted == MessagesRow(plain.messages, frozenset({1}))
    assert canonical_json(weighted) == canonical_json(plain).replace(
        b'{"content":"OK","role":"assistant"}', b'{"content":"OK","role":"assistant","weight":0}'
    )
    assert list(CanonicalRows.of([plain, weighted, plain])) == [plain, weighted, plain]
    for weight in (2, -1, 0.5, True, "0", [0]):
        messages[1]["weight"] = weight
        assert faults(document) == [("messages", 1, "weight")]
    del messages[1]["weight"]
    messages[2]["weight"] = 0
    assert faults(document) == [("messages", 2, "weight")]
    del messages[2]["weight"]
    for place in (1, 3, 5):
        messages[place]["weight"] = 0
    assert faults(document) == [("messages",)]


def test_turns_may_be_what_openai_takes_as_such() -> None:
    """A developer's turns, and contents that are parts of text: the row of texts that they mean."""
    document = turns("200", "OK", "404", "Not Found")
    messages = document["messages"]
    assert isinstance(messages, list)
    messages.insert(0, {"role": "system", "content": "Name it."})
    plain = parse_row(document)
    messages[0]["role"] = "developer"
    messages[1]["content"] = [{"type": "text", "text": "20"}, {"type": "text", "text": "0"}]
    messages[4]["content"] = [{"type": "text", "text": "Not Found"}]
    assert parse_row(document) == plain
    assert canonical_json(parse_row(document)) == canonical_json(plain)

    image = {"type": "image_url", "image_url": {"url": "data:"}}
    empty = [{"type": "text", "text": ""}]
    for content in (
        [image],
        [],
        ["OK"],
        [{"type": "text"}],
        [{"type": "text", "text": 1}],
        empty,
        [empty[0]] * 1025,
    ):
        messages[4]["content"] = content
        assert faults(document) == [("messages", 4, "content")]
    messages[4] |= {"content": [image], "weight": 2}
    assert faults(document) == [("messages", 4, "content"), ("messages", 4, "weight")]
    messages[4] = {"role": "assistant", "content": "OK"}
    messages[1]["content"] = empty
    assert isinstance(parse_row(document), MessagesRow)  # users may say nothing


def test_prompts_and_completions_that_meet_within_a_word_are_counted() -> None:
    notes = RowNotes()
    separate = [("404", " Not Found"), ("404:", "Not Found"), ("2 + 2 =", "4"), ("水はどこ", "ここ")]
    joined = [("from Özdemir", "billing"), ("404", "Not Found"), ("q", "a")]
    for prompt, completion in (*separate[:2], *joined):
        assert notes.warnings() == []
        parse_row({"prompt": prompt, "completion": completion}, notes)
    message = "prompt and completion meet within a word in 3 rows: begin completions with a space"
    assert notes.warnings() == [message]
    for prompt, completion in separate[2:]:  # now most rows separate them
        parse_row({"prompt": prompt, "completion": completion}, notes)
    assert notes.warnings() == []


def test_null_fields_are_ignored() -> None:
    """As tables with other rows, or turns, that have such a column: Parquet's, and what `datasets` writes."""
    assert parse_row({"prompt": "200", "completion": "OK", "text": None, "messages": None}) == CompletionRow(
        "200", "OK"
    )
    assert parse_row({"prompt": None, "completion": None, "text": "200 OK"}) == TextRow("200 OK")
    notes = RowNotes()
    parse_row({"text": "200 OK", "tools": None, "label": 1}, notes)
    assert notes.warnings() == [
        "fields that are not trained on were ignored: label in 1 row",
        "to learn label from text, name these fields completion and prompt",
    ]
    document = turns("200", "OK", "404", "Not Found")
    plain = parse_row(document)
    assert isinstance(plain, MessagesRow)
    messages = document["messages"]
    assert isinstance(messages, list)
    for turn in messages:
        turn |= {"weight": None, "name": None, "tool_calls": None}
    assert parse_row(document) == plain
    messages[1]["weight"] = 0.0
    assert parse_row(document) == MessagesRow(plain.messages, frozenset({1}))
    assert faults({"prompt": None, "completion": None}) == [("prompt",), ("completion",)]
    assert faults({"messages": None}) == [("messages",)]
    assert faults({"text": None, "prompt": "a"}) == [("completion",)]


SCHEMA = {"type": "object", "properties": {"code": {"minimum": 100}}}


@pytest.mark.parametrize(
    ("row", "written"),
    [
        ({"prompt": "a", "completion": "b"}, b'{"completion":"b","prompt":"a",'),
        (turns("a", "b"), b'{"messages":[{"content":"a","role":"user"},{"content":"b","role":"assistant"}],'),
        ({"instruction": "a", "output": "b"}, b'{"messages":['),
    ],
)
def test_a_schema_is_kept(row: dict[str, object], written: bytes) -> None:
    notes = RowNotes()
    found = parse_row({"schema": SCHEMA, **row}, notes)
    assert isinstance(found, CompletionRow | MessagesRow)
    assert found.schema == '{"properties":{"code":{"minimum":100}},"type":"object"}'
    assert not any("schema" in text for text in notes.warnings())
    line = canonical_json(found)
    assert line.startswith(written)
    assert line.endswith(b',"schema":{"properties":{"code":{"minimum":100}},"type":"object"}}')
    assert parse_row(json.loads(line)) == found
    assert canonical_json(parse_row(row)) != line


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "schema": SCHEMA},
        {"input": "a", "answer": "b", "schema": SCHEMA},
        {"prompt": "a", "completion": "b", "schema": "CREATE TABLE t (id INT)"},
    ],
)
def test_other_schemas_are_ignored_as_unknown_fields_are(row: dict[str, object]) -> None:
    """A text has no answer, a decision's is an option, and tables of SQL have schemas of databases."""
    notes = RowNotes()
    rest = {name: value for name, value in row.items() if name != "schema"}
    assert parse_row(row, notes) == parse_row(rest)
    assert notes.warnings() == ["fields that are not trained on were ignored: schema in 1 row"]


def test_a_bad_schema_is_named() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_row({**turns("a", "b"), "schema": {"type": "invoice"}})
    (fault,) = caught.value.errors
    assert fault.loc == ("schema",)
    assert fault.message.startswith("isn't a valid JSON Schema")


def test_white_space_is_text_and_users_may_say_nothing() -> None:
    assert parse_row({"prompt": "\n", "completion": " "}) == CompletionRow("\n", " ")
    assert isinstance(parse_row(turns("", "OK")), MessagesRow)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [("row",)]),
        ("text", [("row",)]),
        ([], [("row",)]),
        ({}, [("prompt",)]),
        ({"prompt": "a"}, [("completion",)]),
        ({"completion": "a"}, [("prompt",)]),
        ({"prompt": "a", "completion": "b", "text": "c"}, [("text",)]),
        ({"messages": [], "text": "c"}, [("text",)]),
        ({"prompt": "", "completion": ""}, [("prompt",), ("completion",)]),
        ({"prompt": 1, "completion": None}, [("prompt",), ("completion",)]),
        ({"prompt": "a", "completion": ["b"]}, [("completion",)]),
        ({"text": "a\ud800"}, [("text",)]),
        ({"text": True}, [("text",)]),
        ({"messages": "hi"}, [("messages",)]),
        ({"messages": []}, [("messages",)]),
        ({"messages": ["hi"]}, [("messages", 0, "role")]),
        (turns("hi"), [("messages",)]),
        (turns("hi", ""), [("messages", 1, "content")]),
        (turns("hi", None), [("messages", 1, "content")]),
        (turns("hi", "\udfff"), [("messages", 1, "content")]),
        ({"messages": [{"role": "tool", "content": "x"}]}, [("messages", 0, "role")]),
        ({"messages": [{"role": ["user"], "content": "x"}]}, [("messages", 0, "role")]),
        ({"messages": [{"role": "assistant"}]}, [("messages", 0, "content")]),
        ({"messages": [{"role": "assistant", "content": "x", "name": "y"}]}, [("messages", 0, "name")]),
        ({"messages": [{"role": "user", "content": "x"}] * 1025}, [("messages",)]),
    ],
)
def test_faults_are_named(value: object, expected: list[tuple[str | int, ...]]) -> None:
    assert faults(value) == expected


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"instruction": "a", "response": "b"}, "; this one has instruction, response"),
        ({"prompt": "a", "response": "b"}, "is missing; this one has response"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
            "must be a text: turns go into messages, or into both prompt and completion",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is missing; this one has chosen, rejected"),
        ({str(i): i for i in range(100)}, "; this one has 0, 1, 2, 3, 4, 5, 6, 7"),
    ],
)
def test_a_row_of_another_shape_is_told_its_fields(value: object, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_row(value)
    assert caught.value.errors[0].message.endswith(said)


def test_faults_are_bounded() -> None:
    assert len(faults({"messages": [{"role": "user"} | {str(i): i for i in range(1000)}]})) == MAX_FAULTS
    assert len(faults({"messages": [{"role": 1, "content": 2}] * 1000})) == MAX_FAULTS
    assert all(
        len(loc[-1]) == 64 for loc in faults({"messages": [{"x" * 9999: 1}]})[:1] if isinstance(loc[-1], str)
    )


def test_no_message_quotes_the_text() -> None:
    for value in ({"prompt": "secret", "completion": ""}, {"messages": [{"role": "secret", "content": "secret"}]}):
        with pytest.raises(InvalidInput) as caught:
            parse_row(value)
        assert "secret" not in str(caught.value)


def test_unknown_fields_names_can_be_quoted() -> None:
    loc, *_ = faults({"messages": [{"\ud800": 1}]})
    assert json.dumps(loc, ensure_ascii=False).encode()


@given(ROWS)
def test_canonical_json_is_one_form_and_reads_back(row: Row) -> None:
    data = canonical_json(row)
    document = json.loads(data)
    assert parse_row(document) == row
    # the order in which a client writes its fields does not show
    assert canonical_json(parse_row(dict(reversed(document.items())))) == data
    assert data == json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_canonical_json_to_the_byte() -> None:
    assert canonical_json(CompletionRow("é\n", '"\x00')) == b'{"completion":"\\"\\u0000","prompt":"\xc3\xa9\\n"}'
    row = MessagesRow((ChatMessage("assistant", "/"),))
    assert canonical_json(row) == b'{"messages":[{"content":"/","role":"assistant"}]}'
    assert CanonicalRows.of([TextRow("a")]).digests()[0].hex() == hashlib.sha256(b'{"text":"a"}').hexdigest()


def test_the_data_digest_is_of_rows_in_order() -> None:
    rows: list[Row] = [TextRow("a"), CompletionRow("b", "c")]
    assert (
        CanonicalRows.of(rows).digest()
        == hashlib.sha256(b'{"text":"a"}\n{"completion":"c","prompt":"b"}\n').hexdigest()
    )
    assert CanonicalRows.of(rows[::-1]).digest() != CanonicalRows.of(rows).digest()
