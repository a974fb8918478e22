"""Rows of other trainers: which conversation each becomes, and faults by the names of their own fields."""

import io
import json

import pytest

from adapters.errors import InvalidInput
from server.model.text.chat import ChatMessage
from server.training.row_files import read_csv, read_jsonl
from server.training.rows import CompletionRow, MessagesRow, RowNotes, TextRow, parse_row

Loc = tuple[str | int, ...]


def said(*turns: tuple[str, str], untrained: frozenset[int] = frozenset()) -> MessagesRow:
    return MessagesRow(tuple(ChatMessage(role, content) for role, content in turns), untrained)


def turn(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def human(value: object) -> dict[str, object]:
    return {"from": "human", "value": value}


def gpt(value: object, **more: object) -> dict[str, object]:
    return {"from": "gpt", "value": value, **more}


def fault(value: object) -> tuple[Loc, str]:
    with pytest.raises(InvalidInput) as caught:
        parse_row(value)
    (error,) = caught.value.errors
    return error.loc, error.message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "output": "2"}, said(("user", "Add."), ("assistant", "2"))),
        ({"instruction": "Add.", "input": "", "output": "2"}, said(("user", "Add."), ("assistant", "2"))),
        ({"instruction": "Add.", "input": None, "output": "2"}, said(("user", "Add."), ("assistant", "2"))),
        (
            {"instruction": "Add.", "input": "1 + 1", "output": "2"},
            said(("user", "Add.\n\n1 + 1"), ("assistant", "2")),
        ),
        ({"instruction": "", "input": "1 + 1", "output": "2"}, said(("user", "1 + 1"), ("assistant", "2"))),
        (
            {"instruction": "And 2 + 2?", "output": "4", "system": "Be brief.", "history": [["1 + 1?", "2"]]},
            said(
                ("system", "Be brief."),
                ("user", "1 + 1?"),
                ("assistant", "2"),
                ("user", "And 2 + 2?"),
                ("assistant", "4"),
            ),
        ),
    ],
)
def test_alpaca(row: object, expected: MessagesRow) -> None:
    notes = RowNotes()
    assert parse_row(row, notes) == expected
    assert notes.mapping == "alpaca"
    (warning,) = notes.warnings()
    assert warning.startswith("rows were read as Alpaca's: the user's turn is the instruction")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [human("1 + 1?"), gpt("2")]}, said(("user", "1 + 1?"), ("assistant", "2"))),
        (
            {"conversations": [{"from": "system", "value": "Add."}, human("1 + 1?"), gpt("2", weight=None)]},
            said(("system", "Add."), ("user", "1 + 1?"), ("assistant", "2")),
        ),
        (
            {"system": "Add.", "conversations": [human("1 + 1?"), gpt("2")]},
            said(("system", "Add."), ("user", "1 + 1?"), ("assistant", "2")),
        ),
        (
            {"conversations": [human("a"), gpt("b", weight=0), human("c"), gpt("d", weight=1), human("e")]},
            said(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), untrained=frozenset({1})),
        ),
        (
            {"conversations": [turn("user", "1 + 1?"), turn("assistant", "2")]},
            said(("user", "1 + 1?"), ("assistant", "2")),
        ),
    ],
)
def test_sharegpt(row: object, expected: MessagesRow) -> None:
    notes = RowNotes()
    assert parse_row(row, notes) == expected
    assert notes.mapping == "sharegpt"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ([turn("user", "1 + 1?")], [turn("assistant", "2")], said(("user", "1 + 1?"), ("assistant", "2"))),
        ([], [turn("assistant", "2")], said(("assistant", "2"))),
        (
            [turn("system", "Add."), turn("user", "a"), turn("assistant", "b", weight=1), turn("user", "c")],
            [turn("assistant", "d"), turn("user", "e"), turn("assistant", "f")],
            said(
                ("system", "Add."),
                ("user", "a"),
                ("assistant", "b"),
                ("user", "c"),
                ("assistant", "d"),
                ("user", "e"),
                ("assistant", "f"),
                untrained=frozenset({2}),
            ),
        ),
    ],
)
def test_trl_trains_on_the_completion_alone(prompt: object, completion: object, expected: MessagesRow) -> None:
    notes = RowNotes()
    assert parse_row({"prompt": prompt, "completion": completion}, notes) == expected
    assert notes.mapping == "trl"


def test_other_fields_are_ignored_and_counted() -> None:
    """Hubs' copies of Alpaca's rows have the rendered text, too, and such a row was trained on as that text."""
    notes = RowNotes()
    row = {"instruction": "Add.", "input": "", "output": "2", "text": "### Instruction: Add.", "id": None}
    assert parse_row(row, notes) == said(("user", "Add."), ("assistant", "2"))
    assert notes.warnings()[1:] == ["fields that are not trained on were ignored: text in 1 row"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}, CompletionRow("a", "b")),
        ({"messages": [turn("assistant", "a")], "conversations": []}, said(("assistant", "a"))),
        ({"text": "a", "instruction": "c"}, TextRow("a")),
        ({"text": "a", "instruction": "c", "output": None, "conversations": None}, TextRow("a")),
    ],
)
def test_our_own_fields_come_first(row: object, expected: object) -> None:
    notes = RowNotes()
    assert parse_row(row, notes) == expected
    assert notes.mapping is None


@pytest.mark.parametrize(
    ("row", "loc", "message"),
    [
        ({"instruction": "a", "output": ""}, ("output",), "must not be empty"),
        ({"instruction": 1, "output": "b"}, ("instruction",), "must be a text"),
        ({"instruction": "a", "input": 1, "output": "b"}, ("input",), "must be a text"),
        ({"instruction": "a", "output": "b", "system": 1}, ("system",), "must be a text"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, ("history",), "must be a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["c", ""]]}, ("history", 0, 1), "must not be empty"),
        ({"conversations": "hi"}, ("conversations",), "must be a list of turns"),
        ({"conversations": []}, ("conversations",), "must be a list of turns"),
        ({"conversations": ["hi"]}, ("conversations", 0, "from"), "is missing: a turn is an object with from and"),
        ({"conversations": [human("a")]}, ("conversations",), "must end with a turn of the assistant"),
        ({"conversations": [human("a"), gpt("")]}, ("conversations", 1, "value"), "must not be empty"),
        ({"system": "s", "conversations": [human(1), gpt("b")]}, ("conversations", 0, "value"), "must be a text"),
        (
            {"conversations": [human("a"), {"from": "function_call", "value": "{}"}, gpt("b")]},
            ("conversations", 1, "from"),
            "must be system, human or gpt",
        ),
        ({"conversations": [gpt("a", weight=2)]}, ("conversations", 0, "weight"), "must be 1, or 0 if"),
        ({"prompt": [], "completion": []}, ("completion",), "must be a list of turns"),
        ({"prompt": ["a"], "completion": [turn("assistant", "b")]}, ("prompt", 0, "role"), "is missing"),
        ({"prompt": [turn("user", "a")], "completion": [turn("assistant", "")]}, ("completion", 0, "content"), ""),
        ({"prompt": [turn("user", "a")], "completion": [turn("user", "b")]}, ("completion",), "must end with"),
    ],
)
def test_faults_have_the_rows_own_names(row: object, loc: Loc, message: str) -> None:
    found, text = fault(row)
    assert found == loc
    assert text.startswith(message)


@pytest.mark.parametrize(
    ("empty", "full"),
    [
        ({"instruction": "a", "output": ""}, {"instruction": "a", "output": "b"}),
        ({"conversations": [human("a"), gpt("")]}, {"conversations": [human("a"), gpt("b")]}),
        ({"conversations": [human("a"), gpt(""), human("c")]}, {"conversations": [human("a"), gpt("b")]}),
    ],
)
def test_rows_with_an_empty_last_answer_are_dropped(empty: object, full: object) -> None:
    """Alpaca's own file has such rows."""
    notes = RowNotes()
    lines = "\n".join(map(json.dumps, (empty, full, empty))).encode()
    assert list(read_jsonl(io.BytesIO(lines), notes)) == [said(("user", "a"), ("assistant", "b"))]
    assert notes.warnings()[1:] == ["2 rows dropped, since the last answer is empty"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "output": "", "history": [["c", ""]]},
        {"conversations": [human("a"), gpt(""), human("c"), gpt("d")]},
        {"messages": [turn("user", "a"), turn("assistant", "")]},
        {"prompt": "a", "completion": ""},
    ],
)
def test_other_empty_answers_are_faults(row: object) -> None:
    with pytest.raises(InvalidInput, match="must not be empty"):
        list(read_jsonl(io.BytesIO(json.dumps(row).encode())))


def test_alpacas_table() -> None:
    notes = RowNotes()
    table = b'output,input,instruction,history\n2,1 + 1,Add.,\n,,Hush.,\n4,,And 2 + 2?,"[[""1 + 1?"", ""2""]]"\n'
    assert list(read_csv(io.BytesIO(table), notes)) == [
        said(("user", "Add.\n\n1 + 1"), ("assistant", "2")),
        said(("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2 + 2?"), ("assistant", "4")),
    ]
    assert notes.mapping == "alpaca"


def test_sharegpts_table() -> None:
    conversation = json.dumps([human("1 + 1?"), gpt("2")]).replace('"', '""')
    table = f'id,conversations\n7,"{conversation}"\n'.encode()
    assert list(read_csv(io.BytesIO(table))) == [said(("user", "1 + 1?"), ("assistant", "2"))]
