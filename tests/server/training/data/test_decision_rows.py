"""Rows of decisions: reading, canonical JSON, and the tokens that are trained on."""

import io
from collections.abc import Mapping

import pytest

from adapters.errors import InvalidInput
from server.decisions.questions import Question, parse_question
from server.model.text.chat import PromptEncoder
from server.training.encoding import Example, RowEncoder
from server.training.row_files import read_rows
from server.training.rows import CanonicalRows, DecisionRow, RowNotes, canonical_json, parse_row
from tests.kits.tiny import own, tiny_tokenizer

EOS = 2
TEAM = {"type": "choice", "instructions": "Which team?", "choices": [{"value": f"team {n}"} for n in range(8)]}
SPAM = {"type": "predicate", "instructions": "Spam?"}
QUESTIONS: Mapping[str, Question] = {"team": parse_question(TEAM), "spam": parse_question(SPAM)}
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> RowEncoder:
    return RowEncoder(PromptEncoder(own(TOKENIZER)), EOS)


def trained(example: Example) -> tuple[str, str]:
    """Return (prompt, trained text)."""
    ids = list(example.token_ids)
    start = example.is_target.index(True)
    assert all(example.is_target[start:])
    return str(TOKENIZER.decode(ids[:start])), str(TOKENIZER.decode(ids[start:]))


def test_rows_are_read_and_canonical_json_reads_as_the_same_row() -> None:
    named = parse_row({"input": "Hi", "question": "team", "answer": "team 1"})
    whole = parse_row({"input": [{"role": "user", "content": "Hi"}], "question": SPAM, "answer": True})
    short = parse_row({"input": "Hi", "answer": "team 2", "question": None})
    assert named == DecisionRow("Hi", "team 1", "team")
    assert whole == DecisionRow("Hi", True, QUESTIONS["spam"])
    assert short == DecisionRow("Hi", "team 2")
    rows = CanonicalRows.of([named, whole, short])
    assert list(rows) == [named, whole, short]
    assert rows.kinds() == {"decision": 3}
    assert canonical_json(short) == b'{"answer":"team 2","input":"Hi"}'


def test_other_fields_are_ignored_and_other_kinds_of_rows_stay_what_they_were() -> None:
    notes = RowNotes()
    parse_row({"input": "Hi", "answer": "a", "id": 7}, notes)
    assert notes.warnings() == ["fields that are not trained on were ignored: id in 1 row"]
    assert not isinstance(parse_row({"prompt": "a", "completion": "b", "input": "c", "answer": "d"}), DecisionRow)
    assert not isinstance(parse_row({"instruction": "a", "input": "c", "output": "b", "answer": "d"}), DecisionRow)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"input": "", "answer": "a"}, "input: must not be empty"),
        ({"input": "a", "answer": 1}, "answer: must be a text, or true or false"),
        ({"input": "a", "answer": "a", "question": 1}, "question: must be an object with a type"),
        (
            {"input": "a", "answer": "yes", "question": SPAM},
            "answer: must be true or false: the question is a pred",
        ),
        ({"input": "a", "answer": "x", "question": TEAM}, "answer: is no value of the question's choices: team 0"),
    ],
)
def test_a_faulty_row_is_refused(row: object, fault: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_row(row)
    assert str(caught.value).startswith(fault)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (DecisionRow("a", "x", "team"), "data.1.answer: is no value of the question's choices: team 0"),
        (DecisionRow("a", "x", "mood"), "data.1.question: is no question of the job: team, spam"),
        (DecisionRow("a", "x"), "data.1.question: is missing; the job's questions are: team, spam"),
    ],
)
def test_an_answer_that_is_no_option_names_its_row(encoder: RowEncoder, row: DecisionRow, fault: str) -> None:
    rows = [DecisionRow("a", True, "spam"), row]
    with pytest.raises(InvalidInput) as caught:
        encoder.asking(QUESTIONS).encode_all(rows, 512)
    assert str(caught.value).startswith(fault)


def test_the_answer_and_its_end_token_follow_the_prompt_that_decide_asks(encoder: RowEncoder) -> None:
    asking = encoder.asking(QUESTIONS)
    for row, option in ((DecisionRow("Hi", "team 3", "team"), "team 3"), (DecisionRow("Hi", False, "spam"), "no")):
        example = asking.encode(row, 512)
        asked = encoder.decisions.prompt("Hi", asking.question(row))
        assert example.token_ids == (*asked, *encoder.decisions.option(option))
        assert trained(example)[1] == f"{option}<|im_end|>"
        reference = asking.reference(row)
        assert reference is not None
        assert (reference.prompt, reference.text) == (asked, option)


def test_options_are_shuffled_by_seed_and_row(encoder: RowEncoder) -> None:
    rows = [DecisionRow(f"Input {n}", "team 3", "team") for n in range(6)]

    def orders(seed: int | None) -> list[str]:
        prompts = [trained(encoder.asking(QUESTIONS, seed).encode(row, 512))[0] for row in rows]
        return [prompt.partition("Options:\n")[2] for prompt in prompts]

    first = orders(1)
    assert len(set(first)) == 6  # each row has its own order
    assert first == orders(1)
    assert first != orders(2)
    assert len(set(orders(None))) == 1  # as served
    assert {"".join(sorted(order)) for order in first} == {"".join(sorted(orders(None)[0]))}
    predicates = [encoder.asking(QUESTIONS, seed).encode(DecisionRow("a", True, "spam"), 512) for seed in range(9)]
    assert len(set(predicates)) == 1  # only choices are shuffled


def test_files_of_decisions() -> None:
    jsonl = b'{"input": "a", "answer": true}\n{"input": "b", "answer": "x", "question": "team"}\n'
    assert list(read_rows(io.BytesIO(jsonl), "jsonl")) == [DecisionRow("a", True), DecisionRow("b", "x", "team")]
    csv = b'id,answer,input\r\n1,x,"a, b"\r\n2,y,c\r\n'
    assert list(read_rows(io.BytesIO(csv), "csv")) == [DecisionRow("a, b", "x"), DecisionRow("c", "y")]


def test_a_sample_of_a_decision_has_the_whole_question(encoder: RowEncoder) -> None:
    (sample,) = encoder.asking(QUESTIONS).samples([DecisionRow("Hi", True, "spam")], 200)
    assert sample.prompt == "Hi\n\nQuestion: Spam?\nOptions:\n- yes\n- no\nAnswer with one option."
    assert sample.reference.text == "yes"
