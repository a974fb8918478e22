"""Questions: what is accepted, what is refused and how, texts of options, canonical JSON and digests."""

import hashlib

import pytest

from adapters.errors import InvalidInput
from server.decisions.parts import input_text
from server.decisions.questions import MAX_FAULTS, Option, parse_question, parse_questions

TEAM = {"type": "choice", "instructions": "Which team?", "choices": [{"value": "billing"}, {"value": "tech"}]}


def _choice(*values: object) -> dict[str, object]:
    return {"type": "choice", "instructions": "", "choices": [{"value": value} for value in values]}


def _faults(value: object) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        parse_question(value)
    return [str(fault) for fault in caught.value.errors]


def test_each_type_is_read_with_its_options() -> None:
    levels = [{"label": "calm"}, {"label": "angry", "description": "shouts"}]
    predicate, choice, score = parse_questions(
        [
            {"type": "predicate", "instructions": "Is it spam?", "name": "spam"},
            _choice("a", True),
            {"type": "score", "instructions": [{"type": "input_text", "text": "How angry?"}], "levels": levels},
        ]
    )
    assert (predicate.name, predicate.options) == ("spam", (Option("yes"), Option("no")))
    assert (choice.instructions, choice.options) == ("", (Option("a"), Option(True)))
    assert (score.instructions, score.options) == ("How angry?", (Option("calm"), Option("angry", "shouts")))


def test_a_stored_question_reads_as_the_same_question() -> None:
    described = {"type": "score", "instructions": "i", "name": "n"} | {
        "levels": [{"label": "low", "description": "d"}, {"label": "high"}]
    }
    for value in ({"type": "predicate", "instructions": "é"}, TEAM, _choice(True, False, "true"), described):
        question = parse_question(value)
        assert question.document() == value
        assert parse_question(question.document()) == question


def test_the_string_true_and_the_boolean_true_are_different_and_look_different() -> None:
    values = (True, False, "true", "false", '"true"', '"', "True", "yes", "x")
    question = parse_question(_choice(*values))
    texts = [option.text for option in question.options]
    assert texts[:5] == ["true", "false", '"true"', '"false"', r'"\"true\""']
    assert texts[6:] == ["True", "yes", "x"]
    assert len(set(texts)) == len(values)
    assert [question.index_of(value) for value in values] == list(range(len(values)))
    assert parse_question(_choice(True, "a")).digest != parse_question(_choice("true", "a")).digest


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (_choice("a", "b", "a"), "question.choices.2.value: equals that of choices.0: each must be different"),
        (_choice(True, True), "question.choices.1.value: equals that of choices.0: each must be different"),
        (_choice("a"), "question.choices: must be a list of 2 to 255, not 1"),
        (_choice(*map(str, range(256))), "question.choices: must be a list of 2 to 255, not 256"),
        (_choice("a", 1), "question.choices.1.value: must be a text, or true or false"),
        (_choice("a", None), "question.choices.1.value: must be a text, or true or false"),
        (_choice("a", ""), "question.choices.1.value: must not be empty"),
        (_choice("a", "\ud800"), "question.choices.1.value: has half of a surrogate pair, which is no character"),
        (
            {"type": "score", "instructions": "", "levels": [{"label": str(n)} for n in range(11)]},
            "question.levels: must be a list of 2 to 10, not 11",
        ),
        (
            {"type": "score", "instructions": "", "levels": [{"label": "a"}, {"label": True}]},
            "question.levels.1.label: must be a text",
        ),
        ({"type": "choice", "choices": TEAM["choices"]}, 'question.instructions: is missing; it may be ""'),
        ({"type": "rank", "instructions": ""}, "question.type: must be predicate, choice or score"),
        (TEAM | {"name": ""}, "question.name: must be a text of 1 to 128 characters"),
        (
            TEAM | {"levels": []},
            "question.levels: is no field here: the fields are choices, instructions, name, type",
        ),
        ([], "question: must be an object with a type: predicate, choice or score"),
    ],
)
def test_a_faulty_question_is_refused_with_its_field(value: object, fault: str) -> None:
    assert _faults(value) == [fault]


@pytest.mark.parametrize("count", [0, 401])
def test_a_request_has_1_to_400_questions(count: int) -> None:
    with pytest.raises(InvalidInput, match="questions: must be a list of 1 to 400 questions"):
        parse_questions([TEAM] * count)


def test_400_questions_are_read_and_many_faults_are_cut() -> None:
    assert len(parse_questions([TEAM] * 400)) == 400
    with pytest.raises(InvalidInput) as caught:
        parse_questions([_choice(1, 2)] * 400)
    assert len(caught.value.errors) == MAX_FAULTS


def test_the_digest_is_of_type_instructions_and_options_in_order_without_the_name() -> None:
    question = parse_question(TEAM)
    canonical = b'{"instructions":"Which team?","options":[{"value":"billing"},{"value":"tech"}],"type":"choice"}'
    assert question.canonical_json() == canonical
    assert question.digest == hashlib.sha256(canonical).hexdigest()
    assert parse_question(TEAM | {"name": "team"}).digest == question.digest
    assert question.reordered([1, 0]).digest != question.digest
    assert parse_question(TEAM | {"instructions": "Who?"}).digest != question.digest


@pytest.mark.parametrize(
    ("question", "answer", "fault"),
    [
        (TEAM, "sales", "answer: is no value of the question's choices: billing, tech"),
        (TEAM, True, "answer: is no value of the question's choices: billing, tech"),
        (
            {"type": "predicate", "instructions": ""},
            "yes",
            "answer: must be true or false: the question is a predicate",
        ),
        (
            _choice(*map(str, range(9))),
            "x",
            "answer: is no value of the question's choices: 0, 1, 2, 3, 4, 5, 6, 7 and 1 more",
        ),
    ],
)
def test_an_answer_that_is_no_option_is_refused(question: object, answer: object, fault: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_question(question).index_of(answer)
    assert str(caught.value) == fault


def test_an_input_is_a_text_or_a_transcript_of_items() -> None:
    parts = [{"type": "input_text", "text": "Hi"}, {"type": "input_json", "data": {"a": 1}}]
    message = {"role": "user", "content": parts}
    assert input_text("Hi") == "Hi"
    assert input_text([message]) == 'Hi\n{"a":1}'
    call = {"type": "function_call", "name": "find", "arguments": "{}", "call_id": "1"}
    output = {"type": "function_call_output", "call_id": "1", "output": "none"}
    spoken = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Bye"}]}
    assert input_text([message, call, output, spoken]) == (
        'user: Hi\n{"a":1}\n\nfunction_call find: {}\n\nfunction_call_output 1: none\n\nassistant: Bye'
    )


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("", "input: must not be empty"),
        (" \n", "input: must not be empty"),
        ([], "input: must be a text, or a list of 1 to 1024 items"),
        ([{"role": "tool", "content": "x"}], "input.0.role: must be user, developer, system or assistant"),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x"}]}],
            "input.0.content.0.type: must be input_text, input_json or output_text: images can't be read",
        ),
        (
            [{"type": "reasoning"}],
            "input.0.type: must be message, function_call or function_call_output",
        ),
    ],
)
def test_a_faulty_input_is_refused_with_its_field(value: object, fault: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        input_text(value)
    assert str(caught.value) == fault
