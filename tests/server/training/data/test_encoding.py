"""Rows as tokens and targets, against the tokenizer's own ids put together by hand."""

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adapters.errors import InvalidInput
from server.model.base.checkpoint import read_tokenizer
from server.model.text.chat import ChatMessage, PromptEncoder
from server.training import encoding
from server.training.encoding import Example, LongRows, Reference, RowEncoder, preview
from server.training.rows import CompletionRow, MessagesRow, Row, TextRow
from server.training.spec import Overlong
from tests.kits.oracles.hugging_face import decoded, templated
from tests.kits.tiny import own, tiny_tokenizer
from tests.server.training.data.test_rows import ROWS

BOS, EOS = 1, 2  # the tiny and the real tokenizer's <|im_start|> and <|im_end|>
LONG = 1 << 20
TEXTS = [
    "Not Found",
    " leading",
    "trailing \n",
    "\n\n",
    "Ünïcödé 日本語 🦜",
    "a\x00b",
    "x<|im_end|>y",
    "<|im_start|>",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
    return RowEncoder(PromptEncoder(own(tokenizer)), EOS)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    return ids


def targets(example: Example) -> list[int]:
    return [token for token, is_target in zip(example.token_ids, example.is_target, strict=True) if is_target]


def chat(*contents: str) -> MessagesRow:
    roles = ["user", "assistant"]
    return MessagesRow(tuple(ChatMessage(roles[i % 2], content) for i, content in enumerate(contents)))


def check_rows(tokenizer: PreTrainedTokenizerBase, rows: RowEncoder, text: str) -> None:
    prompt, completion = plain(tokenizer, "404: "), plain(tokenizer, text)
    example = rows.encode(CompletionRow("404: ", text), LONG)
    assert list(example.token_ids) == [*prompt, *completion, EOS]
    assert list(example.is_target) == [False] * len(prompt) + [True] * (len(completion) + 1)

    example = rows.encode(CompletionRow(text, "404: "), LONG)
    assert list(example.token_ids) == [*completion, *prompt, EOS]
    assert targets(example) == [*prompt, EOS]

    example = rows.encode(TextRow(text), LONG)
    assert list(example.token_ids) == [*completion, EOS]
    assert list(example.is_target) == [False] + [True] * len(completion)

    # a turn's text is encoded as it would be generated, right after the header
    example = rows.encode(chat(text, text, "and?", text), LONG)
    assert targets(example) == [*completion, EOS, *completion, EOS]
    assert example.token_ids[-1] == EOS
    header = [BOS, *plain(tokenizer, "assistant\n")]
    first = example.is_target.index(True)
    assert list(example.token_ids[first - len(header) : first]) == header


@pytest.mark.parametrize("text", TEXTS)
def test_trained_tokens(tokenizer: PreTrainedTokenizerBase, rows: RowEncoder, text: str) -> None:
    check_rows(tokenizer, rows, text)


@pytest.mark.real
def test_trained_tokens_with_the_real_tokenizer(base_dir: Path) -> None:
    tokenizer = read_tokenizer(base_dir)
    rows = RowEncoder(PromptEncoder(own(tokenizer)), EOS)
    for text in TEXTS:
        check_rows(tokenizer, rows, text)
    weighted = MessagesRow(
        chat("404?", "No", "What is 404?", "Not Found", "200?", "No").messages, frozenset({1, 5})
    )
    example = rows.encode(weighted, LONG)
    assert targets(example) == [*plain(tokenizer, "Not Found"), EOS]
    assert decoded(tokenizer, list(example.token_ids)).endswith(
        "What is 404?<|im_end|>\n<|im_start|>assistant\nNot Found<|im_end|>"
    )
    example = rows.encode(chat("What is 404?", "Not Found"), LONG)
    messages = [{"role": "user", "content": "What is 404?"}, {"role": "assistant", "content": "Not Found"}]
    whole = templated(tokenizer, messages)["input_ids"]
    assert [*example.token_ids, *plain(tokenizer, "\n")] == whole  # the template's last line break trains nothing
    assert preview(example, partial(decoded, tokenizer))[-4:] == [
        ("\n", False),
        ("Not", True),
        (" Found", True),
        ("<|im_end|>", True),
    ]


def test_the_prompt_has_the_tokenizers_prefix() -> None:
    backend = tiny_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    rows = RowEncoder(PromptEncoder(own(tokenizer)), EOS)
    for example in (rows.encode(CompletionRow("404", "OK"), LONG), rows.encode(TextRow("404"), LONG)):
        assert [example.token_ids[0], example.token_ids.count(BOS)] == [BOS, 1]
    assert rows.encode(TextRow("404"), LONG).is_target[:2] == (False, True)


@given(row=ROWS, max_length=st.integers(1, 60))
def test_long_rows_are_cut_at_the_end(rows: RowEncoder, row: Row, max_length: int) -> None:
    whole = rows.encode(row, LONG)
    assert whole.token_ids[-1] == EOS
    assert whole.is_target[-1]
    if not any(whole.is_target[:max_length]):
        with pytest.raises(InvalidInput, match="leaves nothing to train on"):
            rows.encode(row, max_length)
        return
    example = rows.encode(row, max_length)
    assert example == Example(whole.token_ids[:max_length], whole.is_target[:max_length])
    too_long = len(whole.token_ids) > max_length
    cut = len(whole.token_ids) - max_length
    assert rows.encode_all([row], max_length).long == (LongRows(1, cut) if too_long else LongRows())
    if too_long:
        with pytest.raises(InvalidInput, match="more than max_length"):
            rows.encode(row, max_length, "refuse")
    else:
        assert rows.encode(row, max_length, "refuse") == whole


def test_a_row_that_just_fits_is_not_truncated(rows: RowEncoder) -> None:
    row = chat("404", "Not Found")
    length = len(rows.encode(row, LONG).token_ids)
    assert rows.encode_all([row], length, "refuse").long == LongRows()
    assert rows.encode_all([row], length - 1).long == LongRows(1, 1)


@given(row=ROWS, max_length=st.integers(2, 60), overlong=st.sampled_from(["auto", "split", "drop"]))
def test_rows_that_fit_are_the_same_under_each_rule(
    rows: RowEncoder, row: Row, max_length: int, overlong: Overlong
) -> None:
    whole = rows.encode(row, LONG)
    encoded = rows.encode_all([row], max_length, overlong)
    if len(whole.token_ids) <= max_length:
        assert list(encoded.examples) == [whole]
        assert encoded.long == LongRows()
    else:
        assert encoded.long != LongRows()
    assert all(len(example.token_ids) <= max_length for example in encoded.examples)


@given(row=ROWS, max_length=st.integers(2, 20))
def test_windows_train_on_each_token_once(rows: RowEncoder, row: Row, max_length: int) -> None:
    whole = rows.encode(row, LONG)
    examples = rows.encode_all([row], max_length, "split").examples
    assert [token for example in examples for token in targets(example)] == targets(whole)


def test_auto_splits_texts_into_windows(rows: RowEncoder) -> None:
    """All but the first 512 tokens of a document were lost, and nobody was warned."""
    document = TextRow("Not Found " * 400)
    whole = rows.encode(document, LONG)
    encoded = rows.encode_all([TextRow("OK"), document], 512, "auto")
    assert [token for window in encoded.examples[1:] for token in targets(window)] == targets(whole)
    assert [len(window.token_ids) for window in encoded.examples[1:-1]] == [512] * (len(encoded.examples) - 2)
    assert encoded.long == LongRows(num_split=1, num_windows=len(encoded.examples) - 1)
    assert len(set(encoded.examples.row_keys())) == 2, "windows of a document have one key"
    (warning,) = encoded.long.warnings(512)
    assert warning == (
        f"1 row longer than training.max_length (512 tokens) split into {len(encoded.examples) - 1} windows; each "
        "counts as a row"
    )


def test_auto_drops_rows_whose_prompt_leaves_no_room_and_cuts_others(rows: RowEncoder) -> None:
    """One overlong prompt refused the whole data set."""
    long_prompt, long_answer = CompletionRow("404 " * 40, "Not Found"), CompletionRow("404", "Not Found " * 40)
    num_tokens = [len(rows.encode(row, LONG).token_ids) for row in (long_prompt, long_answer)]
    encoded = rows.encode_all(
        [long_prompt, CompletionRow("200", "OK"), long_answer, chat("1 " * 99, "2")], 20, "auto"
    )
    assert list(encoded.examples) == [rows.encode(CompletionRow("200", "OK"), 20), rows.encode(long_answer, 20)]
    num_dropped = num_tokens[0] + len(rows.encode(chat("1 " * 99, "2"), LONG).token_ids)
    assert encoded.long == LongRows(1, num_tokens[1] - 20, 2, num_dropped)
    assert encoded.long.num_lost_tokens == num_tokens[1] - 20 + num_dropped
    assert encoded.long.warnings(20) == [
        f"1 row cut at training.max_length (20 tokens): {num_tokens[1] - 20} tokens lost",
        f"2 rows dropped as too long for training.max_length (20 tokens): {num_dropped} tokens lost",
    ]
    assert (encoded.long + encoded.long).scaled(0.5) == encoded.long


def test_drop_drops_all_long_rows(rows: RowEncoder) -> None:
    encoded = rows.encode_all([TextRow("OK"), TextRow("OK " * 40), chat("1", "2 " * 40)], 20, "drop")
    assert list(encoded.examples) == [rows.encode(TextRow("OK"), 20)]
    assert encoded.long.num_dropped == 2


def test_short_distinct_completions_are_facts(rows: RowEncoder) -> None:
    facts: list[Row] = [CompletionRow(f"{number}", f"a {number} b") for number in range(20)]
    assert rows.encode_all(facts, LONG).are_facts
    assert rows.encode_all([*facts, facts[0], chat("1", "a 1 b")], LONG).are_facts  # 20 of 22
    assert not rows.encode_all([*facts, *facts[:3]], LONG).are_facts  # 20 of 23
    assert not rows.encode_all([CompletionRow(f"{number}", "spam") for number in range(20)], LONG).are_facts
    assert not rows.encode_all([CompletionRow("a", f"{number} " * 20) for number in range(20)], LONG).are_facts
    assert not rows.encode_all([*facts, TextRow("a 1 b")], LONG).are_facts
    assert not rows.encode_all([], LONG).are_facts


def test_all_rows_in_their_order(rows: RowEncoder) -> None:
    given_rows: list[Row] = [CompletionRow("404", "Not Found"), TextRow("OK " * 40), chat("200", "OK")]
    encoded = rows.encode_all(given_rows, 80)
    assert list(encoded.examples) == [rows.encode(row, 80) for row in given_rows]
    assert encoded.long.num_truncated == 1
    assert list(rows.encode_all([], 50).examples) == []


def test_a_spelled_end_token_raises_a_warning(rows: RowEncoder) -> None:
    """Users of trainers that parse it as the token write it in their rows."""
    spelling: list[Row] = [
        CompletionRow("404: ", "Not Found<|im_end|>"),
        TextRow("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"),
        chat("hi", "yes<|im_end|>"),
    ]
    given = [*spelling, TextRow("cat <filename>"), chat("<| im_end |>", "yes")]
    (warning,) = rows.encode_all(given, LONG).warnings
    assert warning.startswith("<|im_end|> in 3 rows is encoded as plain text")
    assert rows.encode_all([TextRow("cat <filename>")], LONG).warnings == ()


def test_rows_at_fault_are_named(rows: RowEncoder) -> None:
    given_rows: list[Row] = [
        TextRow("OK"),
        CompletionRow("404 " * 40, "Not Found"),
        TextRow("OK"),
        chat("1 " * 99, "2"),
    ]
    with pytest.raises(InvalidInput) as caught:
        rows.encode_all(given_rows, 20, loc=("validation",))
    assert [error.loc for error in caught.value.errors] == [
        ("validation", 1, "completion"),
        ("validation", 3, "messages"),
    ]
    assert caught.value.errors[0].message.startswith("leaves nothing to train on within max_length 20 of ")
    assert caught.value.errors[0].message.endswith(" tokens: raise max_length, or shorten the row")
    with pytest.raises(InvalidInput) as caught:
        rows.encode_all([TextRow("OK OK OK")] * 1000, 2, "refuse")
    assert len(caught.value.errors) == encoding.MAX_FAULTS


def test_too_many_tokens_are_refused(rows: RowEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MAX_TOKENS", 10)
    length = len(rows.encode(TextRow("OK"), LONG).token_ids)
    assert len(rows.encode_all([TextRow("OK")] * (10 // length), LONG).examples) == 10 // length
    with pytest.raises(InvalidInput, match="more than 10 tokens"):
        rows.encode_all([TextRow("OK")] * (10 // length + 1), LONG)


@pytest.mark.parametrize(
    ("end", "ends", "expected"),
    [
        ("<|endoftext|>", (0,), [0]),  # another of the base's end tokens: as the template has it
        ("<|endoftext|>", (), [EOS]),  # no end token of the base: its own, so that generation ends
        ("\n", (), [EOS]),
        ("", (), [EOS]),
    ],
)
def test_templates_with_other_ends_of_turns(end: str, ends: tuple[int, ...], expected: list[int]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '" + end.replace("\n", "\\n") + "' }}{% endfor %}"
    )
    rows = RowEncoder(PromptEncoder(own(tokenizer)), EOS, ends)
    example = rows.encode(chat("404", "Not Found"), LONG)
    assert targets(example) == [*plain(tokenizer, "Not Found"), *expected]
    assert example.token_ids[: -1 - len(plain(tokenizer, "Not Found"))] == tuple(
        tokenizer("user: 404" + end + "assistant: ", add_special_tokens=False)["input_ids"]
    )


def test_references(tokenizer: PreTrainedTokenizerBase, rows: RowEncoder) -> None:
    encoder = PromptEncoder(own(tokenizer))
    row = chat("404", "Not Found", "200", "OK")
    length = len(plain(tokenizer, "OK"))
    assert rows.reference(CompletionRow("200", "OK")) == Reference(tuple(plain(tokenizer, "200")), "OK", length)
    assert rows.reference(row) == Reference(tuple(encoder.messages(row.messages[:3])), "OK", length)
    earlier = MessagesRow(row.messages, frozenset({3}))
    length = len(plain(tokenizer, "Not Found"))
    assert rows.reference(earlier) == Reference(tuple(encoder.messages(row.messages[:1])), "Not Found", length)
    assert rows.reference(TextRow("OK")) is None
    assert rows.reference(MessagesRow((ChatMessage("assistant", "OK"),))) is None
    mixed: list[Row] = [TextRow("a"), *(CompletionRow(str(i), "b") for i in range(5))]
    assert rows.references(mixed, limit=2) == [rows.reference(mixed[1]), rows.reference(mixed[2])]


def test_references_have_a_budget(rows: RowEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that `max_length` drops or cuts were asked, too, and hundreds of long prompts were read."""
    given: list[Row] = [CompletionRow("404 " * count, "b") for count in (40, 1, 30, 2, 3)]
    whole = [reference for row in given if (reference := rows.reference(row)) is not None]
    assert rows.references(given, max_length=20) == [whole[1], whole[3], whole[4]]
    fits = len(rows.encode(given[2], LONG).token_ids)  # with the end token
    assert whole[2] in rows.references(given, max_length=fits)
    assert whole[2] not in rows.references(given, max_length=fits - 1)
    monkeypatch.setattr(encoding, "MAX_REFERENCE_TOKENS", whole[0].length + whole[1].length)
    assert rows.references(given) == whole[:2]
    monkeypatch.setattr(encoding, "MAX_REFERENCE_TOKENS", 1)
    assert rows.references(given) == whole[:1]


@given(row=ROWS)
def test_a_preview_shows_everything(tokenizer: PreTrainedTokenizerBase, rows: RowEncoder, row: Row) -> None:
    decode = partial(decoded, tokenizer)
    example = rows.encode(row, LONG)
    shown = preview(example, decode)
    assert "".join(text for text, _ in shown) == decode(list(example.token_ids))
    if not isinstance(row, TextRow):  # whose first token, no target, may be part of a character
        assert decode(targets(example)) == "".join(text for text, is_target in shown if is_target)
    if "\N{REPLACEMENT CHARACTER}" not in decode(list(example.token_ids)):
        assert all("\N{REPLACEMENT CHARACTER}" not in text for text, _ in shown)


def test_a_preview_of_a_cut_character(tokenizer: PreTrainedTokenizerBase, rows: RowEncoder) -> None:
    decode = partial(decoded, tokenizer)
    token_ids = plain(tokenizer, "OK 🦜")
    assert len(plain(tokenizer, "🦜")) > 2
    shown = preview(rows.encode(TextRow("OK 🦜"), len(token_ids) - 1), decode)
    assert shown[-1] == ("\N{REPLACEMENT CHARACTER}", True)


def test_samples_are_the_first_rows_with_short_different_prompts(rows: RowEncoder) -> None:
    """A chat's is its last turn before the answer; a text has none."""
    mixed: list[Row] = [
        TextRow("A text"),
        CompletionRow("a" * encoding.MAX_SAMPLE_CHARACTERS, " long"),
        CompletionRow("nul", " a\0b"),
        MessagesRow((ChatMessage("assistant", "Nobody asked"),)),
        CompletionRow("404", " Not Found"),
        CompletionRow("404", " Gone"),
        chat("Hello", "Hi", "What is 404?", "Not Found"),
        CompletionRow("503 " * 40, " Service Unavailable"),
        CompletionRow("200", " OK"),
        CompletionRow("201", " Created"),
    ]
    found = rows.samples(mixed, 100)
    assert [one.prompt for one in found] == ["404", "What is 404?", "200"]
    assert [one.reference for one in found] == [rows.reference(mixed[place]) for place in (4, 6, 8)]
    assert rows.samples([TextRow("A text")] * 3, 100) == []
