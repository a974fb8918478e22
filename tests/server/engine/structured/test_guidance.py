"""Grammars: allowed tokens against a listed language, refusals, and the time of checks."""

import json
import operator
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import numpy as np
import pytest

from adapters.errors import InvalidInput
from server.engine import grammar_check
from server.engine.grammar import MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, regex_of
from server.engine.grammar_check import WALL_SECONDS, _answer_of
from server.engine.guidance import Constraint, Guidance
from server.engine.request import Grammar
from server.errors import NotReady
from tests.kits.engines import token_bytes
from tests.kits.grammars import CODES, HOSTILE_REGEX, HOSTILE_SCHEMA, Language, growing, guidance_of
from tests.kits.tiny import own, tiny_tokenizer

VOCAB = 520  # wider than the tokenizer, as logits may be
EOS = (0, 2)


@pytest.fixture(scope="module")
def real_guidance(base_dir: Path) -> Iterator[Guidance]:
    """Yield a `Guidance` of SmolLM2's tokenizer, whose end token is 2."""
    guidance = Guidance((base_dir / "tokenizer.json").read_text(encoding="utf-8"), 49152, (2,))
    yield guidance
    guidance.close()


@pytest.fixture(scope="module")
def guidance() -> Iterator[Guidance]:
    guidance = guidance_of(own(tiny_tokenizer()), VOCAB, EOS)
    yield guidance
    guidance.close()


CHOICES = (
    *(
        "yes",
        "yes, please",
        "no",
        "a.b*c",
        "(a|b)[c]{2}",
        "\\d+",
        "^$",
        "/x/ #&~-",
        "two\nlines\t",
        "Größe 日本 🦜",
    ),
    *('"quoted"', "'", "<|im_end|>", "%", " padded "),
)
TEXTS = Language(regex_of(CHOICES), CHOICES)


@pytest.mark.parametrize("language", [CODES, TEXTS], ids=["codes", "texts"])
def test_masks_match_the_language(guidance: Guidance, language: Language) -> None:
    """Along random walks, including inside a character of two bytes."""
    names = token_bytes(own(tiny_tokenizer()))
    guidance.check(language.grammar)
    rng = random.Random(1)
    ends = set()
    for _ in range(40):
        constraint, text = guidance.constraint(language.grammar), b""
        while not constraint.is_complete:
            forbidden = constraint.forbidden()
            assert forbidden is not None
            assert forbidden.shape == (VOCAB,)
            allowed = set((~forbidden).nonzero()[0].tolist())
            possible = language.allowed(text, names, VOCAB, EOS)
            assert allowed <= possible if language.is_forced(text) else allowed == possible
            token_id = rng.choice(sorted(allowed))
            if token_id in EOS:
                break
            constraint.accept(token_id)
            text += names.bytes_of(token_id)
        assert text in language.words
        assert constraint.error is None
        ends.add(constraint.is_complete)
    assert ends == {True, False}  # by itself, and by an end token


def test_each_sequence_has_its_own_state(guidance: Guidance) -> None:
    grammar = Grammar("regex", "[ab]c")
    guidance.check(grammar)
    first, second = guidance.constraint(grammar), guidance.constraint(grammar)
    (a,) = tiny_tokenizer().encode("a")
    first.accept(a)
    moved, still = first.forbidden(), second.forbidden()
    assert moved is not None
    assert still is not None
    assert moved[a]
    assert not still[a]


def mask(constraint: Constraint) -> list[bool]:
    forbidden = constraint.forbidden()
    assert forbidden is not None
    return [bool(one) for one in forbidden]


@pytest.mark.thorough
def test_a_forced_token_is_the_only_continuation(guidance: Guidance) -> None:
    """Along random walks, only other tokenizations of the same text are allowed, and its longest token is forced.
    If there is a choice, nothing is forced."""
    names = token_bytes(own(tiny_tokenizer()))
    schema = {"type": "object", "properties": {"first": {"type": "boolean"}, "then": {"enum": ["a b", "b"]}}}
    grammar = Grammar("json_schema", json.dumps({**schema, "required": [*schema["properties"]]}))
    guidance.check(grammar)
    rng = random.Random(2)
    num_forced = num_open = 0
    for _ in range(8):
        constraint = guidance.constraint(grammar)
        while not constraint.is_complete:
            forced = constraint.forced(99)
            assert constraint.forced(2) == forced[:2]
            for place, token_id in enumerate(forced):
                moved = constraint.after(forced[:place])
                assert allowed_by(moved) == [token_id]
                assert moved.forced(99) == forced[place:]
                splits = [names.bytes_of(split) for split in allowed_anew(constraint, forced[:place])]
                assert max(splits, key=len) == names.bytes_of(token_id)
                assert all(names.bytes_of(token_id).startswith(split) for split in splits)
            allowed = allowed_by(constraint)
            num_forced += bool(forced)
            num_open += not forced
            if not forced:
                splits = [names.bytes_of(split) for split in allowed]
                assert not all(max(splits, key=len).startswith(split) for split in splits) or {*allowed} & {*EOS}
                assert allowed_anew(constraint) == allowed
            token_id = rng.choice(allowed)
            if token_id in EOS:
                break
            constraint.accept(token_id)
    assert num_forced > 20
    assert num_open > 8


def allowed_anew(constraint: Constraint, then: Sequence[int] = ()) -> list[int]:
    """Return the allowed tokens of a matcher that was never asked for forced tokens."""
    matcher = constraint._compile_again()
    matcher.consume_tokens([*constraint._token_ids, *then])
    allowed: list[int] = np.frombuffer(matcher.compute_logit_bias(), np.uint8).nonzero()[0].tolist()
    return allowed


WORDS = (
    ("low", "lower"),  # not distinguished by single tokens: l, lo, low and lower are all parts of one of them
    ("user", "users"),
    ("cat", "category"),
    ("cat", "cqz"),
    ("XL", "XXL"),
    ("WA", "WV", "WI", "WY"),
    ("xa", "x日", "xé"),
    ("north", "northwest", "northeast"),
    ("get", "get_all", "getall"),
)


@pytest.mark.parametrize("words", WORDS, ids="|".join)
@pytest.mark.parametrize("kind", ["regex", "json_schema"])
def test_no_choice_is_lost(
    real_guidance: Guidance, words: Sequence[str], kind: Literal["regex", "json_schema"]
) -> None:
    """Each word of a language can be generated by some tokenization, up to its last byte."""
    source = "|".join(words) if kind == "regex" else json.dumps({"enum": list(words)})
    grammar = Grammar(kind, source)
    real_guidance.check(grammar)
    for word in words:
        text = (word if kind == "regex" else json.dumps(word, ensure_ascii=False)).encode()
        assert can_be_answered(real_guidance, grammar, text), word


def can_be_answered(guidance: Guidance, grammar: Grammar, text: bytes) -> bool:
    bytes_of = guidance._ready_tokenizer().decode_bytes
    todo: dict[bytes, list[int]] = {b"": []}  # one tokenization of each prefix reached
    seen: set[bytes] = set()
    while todo:
        begun, split = todo.popitem()
        seen.add(begun)
        constraint = guidance.constraint(grammar)
        for token_id in split:
            constraint.accept(token_id)
        if begun == text:
            return constraint.is_complete or 2 in allowed_by(constraint)
        for token_id in allowed_by(constraint):
            longer = begun + bytes_of([token_id])
            if token_id != 2 and text.startswith(longer) and longer not in seen:
                todo[longer] = [*split, token_id]
    return False


ENDLESS = {"const": "ab" * 500}  # 30,000 tokens, of which only the next few are requested


@pytest.mark.parametrize(
    ("grammar", "begins"),
    [
        (Grammar("regex", "x|y((a{100}){100}){100}b"), "y"),
        (Grammar("regex", "x|y((ab){300}){300}c"), "y"),
        (
            Grammar(
                "json_schema",
                json.dumps(
                    {
                        "anyOf": [
                            {"type": "string"},
                            {"type": "array", "items": ENDLESS, "minItems": 60, "maxItems": 60},
                        ]
                    }
                ),
            ),
            "[",
        ),
    ],
)
def test_long_forced_text_costs_no_more_per_token(guidance: Guidance, grammar: Grammar, begins: str) -> None:
    """A few dozen characters suffice for megabytes of forced text, after a prefix that no trial generates."""
    guidance.check(grammar)
    constraint = guidance.constraint(grammar)
    constraint.accept(tiny_tokenizer().encode(begins)[0])
    before = time.thread_time()
    for _ in range(20):
        forced = constraint.forced(15)
        assert forced
        assert allowed_by(constraint) == [forced[0]]
        assert constraint.after(forced).forced(15)
        assert constraint.num_allowed(forced) == len(forced)
        constraint.accept(forced[0])
    assert constraint.error is None
    assert time.thread_time() - before < 0.5


def test_tokens_of_the_same_text_are_looked_up_for_once(
    guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = Grammar("json_schema", json.dumps({"const": "ab" * 2000}))
    guidance.check(grammar)
    constraint = guidance.constraint(grammar)
    asked = Mock(wraps=constraint._asked)
    monkeypatch.setattr(constraint, "_asked", asked)
    for num in range(60):
        token_id, *_ = constraint.forced(15)
        assert allowed_by(constraint) == [token_id]
        constraint.accept(token_id)
        assert asked.call_count == num // 15 + 1
    assert constraint.error is None


def allowed_by(constraint: Constraint) -> list[int]:
    forbidden = constraint.forbidden()
    assert forbidden is not None
    allowed: list[int] = (~forbidden).nonzero()[0].tolist()
    return allowed


def test_a_draft_is_followed_by_a_copy(guidance: Guidance) -> None:
    """The sequence's own state doesn't change."""
    grammar = Grammar("regex", "(ab|cd){3}")
    guidance.check(grammar)
    a, b, c, d, x = (tiny_tokenizer().encode(letter)[0] for letter in "abcdx")
    constraint = guidance.constraint(grammar)
    for draft, num_allowed in (([], 0), ([x], 0), ([a, b, c, d], 4), ([a, b, c, c, d], 3), ([a, b] * 4, 6)):
        assert constraint.num_allowed(draft) == num_allowed
    for num in range(6):
        ahead, walked = constraint.after([a, b, c, d, a, b][:num]), guidance.constraint(grammar)
        for token_id in [a, b, c, d, a, b][:num]:
            walked.accept(token_id)
        assert mask(ahead) == mask(walked)
    assert constraint.after([a, b] * 3).is_complete
    assert not constraint.is_complete
    assert mask(constraint) == mask(guidance.constraint(grammar))


def test_a_failing_draft_does_not_fail_the_sequence(guidance: Guidance) -> None:
    grammar = Grammar("regex", "ab")
    guidance.check(grammar)
    a, x = (tiny_tokenizer().encode(letter)[0] for letter in "ax")
    constraint = guidance.constraint(grammar)
    astray = constraint.after([a, x])
    assert astray.forbidden() is None
    assert astray.error is not None
    assert constraint.error is None
    assert constraint.forbidden() is not None
    constraint.accept(a)
    assert constraint.num_allowed([a]) == 0


@pytest.mark.parametrize(
    "regex",
    [
        "[",
        "a(?=b)",
        r"(a)\1",
        r"[^\x00-\U0010FFFF]",  # matches nothing
        "(" * 3000 + "a" + ")" * 3000,
        "é" * (MAX_REGEX_BYTES // 2 + 1),
        HOSTILE_REGEX,
    ],
)
def test_invalid_regexes_are_refused(guidance: Guidance, regex: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        guidance.check(Grammar("regex", regex))
    assert [error.loc for error in caught.value.errors] == [("regex",)]


def deep(levels: int) -> object:
    return {"type": "array", "items": deep(levels - 1)} if levels else {"type": "null"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "frob"},
        {"not": {}},
        {"type": "array", "uniqueItems": True},
        {"$ref": "#"},
        {"$ref": "https://example.com/schema"},
        {"enum": []},
        {"type": "string", "format": "no-such-format"},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]},
        {"x-guidance": {"lenient": True}, "not": {}},
        {"type": "object", "minProperties": 2},  # one key could occur twice
        {"properties": {"a": {"type": "object", "minProperties": 3, "required": ["b", "c"]}}},
        {"type": "string", "description": "x" * MAX_SCHEMA_BYTES},
        {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(2500)}},
        deep(200),
        HOSTILE_SCHEMA,
    ],
)
def test_unsupported_schemas_are_refused(guidance: Guidance, schema: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        guidance.check(Grammar("json_schema", json.dumps(schema)))
    assert [error.loc for error in caught.value.errors] == [("response_format", "json_schema", "schema")]


def test_a_hostile_grammar_leaves_no_process_behind(guidance: Guidance) -> None:
    """It is refused in time, the next grammar passes at once, and accepted grammars aren't checked again."""
    guidance.check(Grammar("regex", "warm"))
    bounds, took, end = (2.0, 1.0, 1.0), [9.0] * 3, time.monotonic() + 60
    while not all(map(operator.lt, took, bounds)) and time.monotonic() < end:  # on a busy machine
        good, moments = Grammar("regex", f"good{end - time.monotonic()}"), [time.monotonic()]
        with pytest.raises(InvalidInput, match="too long to compile"):
            guidance.check(Grammar("json_schema", json.dumps(HOSTILE_SCHEMA)))
        moments.append(time.monotonic())
        guidance.check(good)
        moments.append(time.monotonic())
        for _ in range(1000):
            guidance.check(good)
        moments.append(time.monotonic())
        took = [after - before for before, after in pairwise(moments)]
    assert all(map(operator.lt, took, bounds)), took


def test_the_process_may_be_killed(guidance: Guidance) -> None:
    guidance.check(Grammar("regex", "before"))
    process = guidance._checker._process
    assert process is not None
    process.kill()
    process.wait()
    guidance.check(Grammar("regex", "after"))
    assert guidance.holds(Grammar("regex", "after"))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux shows a process's environment")
def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:password@host/base")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    guidance = guidance_of(own(tiny_tokenizer()), VOCAB, EOS)
    guidance.check(Grammar("regex", "secret"))
    process = guidance._checker._process
    assert process is not None
    names = {entry.split(b"=")[0] for entry in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")}
    guidance.close()
    assert not names & {b"DATABASE_URL", b"AWS_SECRET_ACCESS_KEY"}


def test_a_busy_machine_does_not_refuse_a_grammar(guidance: Guidance) -> None:
    """The other process doesn't run for longer than a hostile grammar may take."""
    guidance.check(Grammar("regex", "quick"))
    process = guidance._checker._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    timer = threading.Timer(2 * WALL_SECONDS, process.send_signal, [signal.SIGCONT])
    timer.start()
    guidance.check(Grammar("regex", "slow"))
    timer.join()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are tied to a core of Linux")
def test_a_grammar_has_its_share_of_a_busy_core(guidance: Guidance) -> None:
    """A hostile grammar has had its share, and is refused in time, alongside a dozen busy processes."""
    guidance.check(Grammar("regex", "calm"))
    process = guidance._checker._process
    assert process is not None
    all_cores = os.sched_getaffinity(process.pid)
    core = {min(all_cores)}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(12)]
    for one in [process, *busy]:
        os.sched_setaffinity(one.pid, core)
    try:
        took, end = 9.0, time.monotonic() + 60
        while took >= 2 and time.monotonic() < end:  # at times there are other processes besides the dozen
            begun = time.monotonic()
            with pytest.raises(InvalidInput, match="too long to compile"):
                guidance.check(Grammar("json_schema", json.dumps(HOSTILE_SCHEMA)))
            took = time.monotonic() - begun
        assert took < 2
    finally:
        os.sched_setaffinity(process.pid, all_cores)
        for one in busy:
            one.kill()
            one.wait()


def test_the_other_process_is_started_with_our_own_priority() -> None:
    """Threads have their own priority, which their child processes inherit."""
    guidance = guidance_of(own(tiny_tokenizer()), VOCAB, EOS)
    guidance.start()
    try:
        guidance.check(Grammar("regex", "ready"))
        process = guidance._checker._process
        assert process is not None
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == os.getpriority(os.PRIO_PROCESS, os.getpid())
    finally:
        guidance.close()


def test_the_process_imports_no_code_from_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be started in a folder that happens to have a server.py or a signal.py."""
    for name in ("server.py", "signal.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    guidance = guidance_of(own(tiny_tokenizer()), VOCAB, EOS)
    try:
        guidance.check(Grammar("regex", "ready"))
    finally:
        guidance.close()


def test_a_machine_that_stays_busy_is_reported(guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported in time and blamed on no grammar; the next grammar passes."""
    guidance.check(Grammar("regex", "first"))
    monkeypatch.setattr(grammar_check, "_STARVED_SECONDS", 0.2)
    process = guidance._checker._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(NotReady, match="too busy to compile"):
        guidance.check(Grammar("regex", "second"))
    monkeypatch.undo()
    guidance.check(Grammar("regex", "second"))


def test_a_child_that_never_gets_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "_STARVED_SECONDS", 0.2)
    reader, writer = os.pipe()
    child = subprocess.Popen(["sleep", "60"], pass_fds=[writer])
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert json.loads(_answer_of(child.pid, answer)) == "the machine is too busy to compile grammars now"
    child.kill()
    child.wait()


@pytest.mark.parametrize(
    ("takes_processor", "says"), [(False, "done"), (True, "takes too long to compile: make it simpler")]
)
def test_how_long_a_child_is_waited_for(takes_processor: bool, says: str) -> None:
    """A child that hasn't had processor time is waited for; one that had it and doesn't answer is not."""
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import os, sys, time; begun = time.monotonic()\n"
            "while time.monotonic() < begun + 2: sys.argv[2] or time.sleep(0.1)\n"
            "os.write(int(sys.argv[1]), b'\"done\"\\n')",
            *(str(writer), "x" * takes_processor),
        ],
        pass_fds=[writer],
    )
    os.close(writer)
    begun = time.monotonic()
    try:
        with os.fdopen(reader, "rb") as answer:
            assert json.loads(_answer_of(child.pid, answer)) == says
    finally:
        child.kill()
        child.wait()
    assert takes_processor or time.monotonic() - begun > WALL_SECONDS


def follow(constraint: Constraint, seed: int, max_tokens: int = 600, avoid: str = "d") -> int:
    """Accept arbitrary tokens without `avoid`; return how many until no more could be accepted."""
    names, rng = token_bytes(own(tiny_tokenizer())), random.Random(seed)
    for num in range(max_tokens):
        forbidden = constraint.forbidden()
        if forbidden is None:
            return num
        allowed = [token_id for token_id in (~forbidden).nonzero()[0].tolist() if token_id not in EOS]
        constraint.accept(rng.choice([t for t in allowed if avoid.encode() not in names.bytes_of(t)]))
        if constraint.error is not None:
            return num + 1
    return max_tokens


def test_a_grammar_that_becomes_too_complex_reports_it(guidance: Guidance) -> None:
    grammar = growing(61)
    guidance.check(grammar)
    constraint = guidance.constraint(grammar)
    assert 61 < follow(constraint, 0) < 600
    assert constraint.error is not None
    assert [fault.loc for fault in constraint.error.errors] == [("regex",)]
    assert not constraint.is_complete


def test_a_too_complex_answer_affects_no_other(guidance: Guidance) -> None:
    """It affects neither running answers nor later ones, each of which alone would not have grown as complex."""
    grammar, enough = growing(62), 75
    guidance.check(grammar)
    early, late = guidance.constraint(grammar), guidance.constraint(grammar)
    assert follow(early, 1, max_tokens=65) == 65
    assert follow(guidance.constraint(grammar), 2) < 600
    assert follow(early, 1, max_tokens=enough - 65) == enough - 65
    assert follow(late, 5, max_tokens=enough) == enough
    for _ in range(2):
        guidance.check(grammar)
        assert follow(guidance.constraint(grammar), 5, max_tokens=enough) == enough
    assert follow(guidance.constraint(grammar), 2) < 600, "the limit itself is as it was"


def test_the_cache_of_grammars_is_limited(guidance: Guidance) -> None:
    first = Grammar("regex", "first")
    guidance.check(first)
    for number in range(64):
        guidance.check(Grammar("regex", f"a{number}"))
    assert not guidance.holds(first)
    assert not guidance.constraint(first).is_complete  # compiled again if needed
