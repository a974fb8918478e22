"""The grammar of adapter expressions."""

import contextlib
import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InvalidExpression
from adapters.expression import MAX_PARTS, Term, parse, render
from adapters.names import name_fault

FIRST = string.ascii_letters + string.digits
NAMES = st.builds(str.__add__, st.sampled_from(FIRST), st.text(FIRST + "_-.", max_size=63)).filter("base".__ne__)
WEIGHTS = st.floats(-100, 100) | st.integers(-100, 100).map(float) | st.just(1.0)
TERMS = st.builds(Term, NAMES, st.none() | st.integers(1, 10**12), st.none(), WEIGHTS) | st.builds(
    Term, NAMES, st.none(), NAMES.filter(lambda alias: not alias.isdigit()), WEIGHTS
)


CASES = json.loads((Path(__file__).parent.parent / "kits" / "expressions.json").read_text("utf-8"))
"""Cases for this parser and for the page's, which `tests/web/test_expression.py` runs."""


@pytest.mark.parametrize("case", CASES["valid"], ids=lambda case: case["text"][:40])
def test_shared_expressions_parse(case: dict[str, object]) -> None:
    found = [
        {"name": term.name, "pin": str(term.version or term.alias or ""), "weight": term.weight}
        for term in parse(str(case["text"]))
    ]
    assert found == case["terms"]


@pytest.mark.parametrize("text", CASES["invalid"], ids=lambda text: text[:40])
def test_shared_faults_are_refused(text: str) -> None:
    with pytest.raises(InvalidExpression):
        parse(text)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("base", ()),
        ("tweets", (Term("tweets"),)),
        ("tweets@3", (Term("tweets", version=3),)),
        ("tweets@prod", (Term("tweets", alias="prod"),)),
        ("tweets@latest", (Term("tweets", alias="latest"),)),
        ("tweets@1.5", (Term("tweets", alias="1.5"),)),
        ("tweets*0.5", (Term("tweets", weight=0.5),)),
        ("tweets*-2", (Term("tweets", weight=-2.0),)),
        ("tweets*.25", (Term("tweets", weight=0.25),)),
        ("tweets*100", (Term("tweets", weight=100.0),)),
        ("tweets*0.7+movies@2*0.3", (Term("tweets", weight=0.7), Term("movies", 2, None, 0.3))),
        ("tweets * 0.7  +  movies@2 *0.3", (Term("tweets", weight=0.7), Term("movies", 2, None, 0.3))),
        ("a-b*-0.5", (Term("a-b", weight=-0.5),)),
        ("a+a", (Term("a"), Term("a"))),
        ("1.0*0", (Term("1.0", weight=0.0),)),
        ("baseline", (Term("baseline"),)),
        ("x" * 64, (Term("x" * 64),)),
        ("+".join(["a"] * MAX_PARTS), (Term("a"),) * MAX_PARTS),
    ],
)
def test_expressions_parse(text: str, terms: tuple[Term, ...]) -> None:
    assert parse(text) == terms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" a", "at character 1: expected an adapter's name"),
        ("a ", "at character 2: nothing may follow the last part"),
        ("-a", "at character 1: expected an adapter's name"),
        ("a+", "at character 3: expected an adapter's name, which starts with a letter or digit, not the end"),
        ("a++b", "at character 3: expected an adapter's name"),
        ("a b", "at character 3: expected \"+\" and another part, or the end, not 'b'"),
        ("a@", "at character 3: expected a version (a number from 1) or an alias"),
        ("a@0", "at character 3: versions count from 1"),
        ("a @1", 'at character 3: expected "+"'),
        ("a@ 1", "at character 3: expected a version"),
        ("a*", "at character 3: expected a weight such as 0.7 or -1, not the end"),
        ("a*- 1", "at character 3: expected a weight"),
        ("a*+1", "at character 3: expected a weight"),
        ("a*nan", "at character 3: expected a weight"),
        ("a*1e-3", "at character 4: weights have no exponent"),
        ("a*100.5", "at character 3: weights go from -100 to 100"),
        ("a*-" + "9" * 400, "at character 3: weights go from -100 to 100"),
        ("a*1*2", 'at character 4: expected "+"'),
        ("a*1.", "at character 4: expected"),
        ("a*0.5@2", 'at character 6: expected "+"'),
        ("a*٣", "at character 3: expected a weight"),
        ("ä", "at character 1: expected an adapter's name, which starts with a letter or digit, not '\\xe4'"),
        ("a\n", "at character 2: expected \"+\" and another part, or the end, not '\\n'"),
        ("\ud800", "at character 1: expected an adapter's name"),
        ("a+" + "x" * 65, "at character 3: names have at most 64 characters, this one has 65"),
        ("a@" + "x" * 65, "at character 3: names have at most 64 characters, this one has 65"),
        ("base+a", 'at character 1: "base" is the frozen model'),
        ("a + base*0.5", 'at character 5: "base" is the frozen model'),
        ("base@1", 'at character 1: "base" is the frozen model'),
        ("+".join(["a"] * (MAX_PARTS + 1)), "at character 33: there are at most 16 parts"),
        ("a" * 5000, "5000 characters long"),
    ],
)
def test_invalid_expressions_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidExpression) as caught:
        parse(text, field="model")
    (error,) = caught.value.errors
    assert error.loc == ("model",)
    assert message in error.message
    str(caught.value).encode()  # no lone surrogates, which can't be encoded


@given(st.lists(TERMS, min_size=1, max_size=MAX_PARTS).filter(lambda terms: len(render(terms)) <= 4096))
@settings(deadline=None)
def test_rendered_terms_parse_back(terms: list[Term]) -> None:
    text = render(terms)
    assert parse(text) == tuple(terms)
    assert parse(text.replace("+", "  + ").replace("*", " * ")) == tuple(terms)


@given(st.text(st.sampled_from("ab1@*+-. e0é"), max_size=12) | st.text(max_size=8))
@settings(deadline=None)
def test_any_text_parses_or_is_refused_clearly(text: str) -> None:
    with contextlib.suppress(InvalidExpression):
        terms = parse(text)
        assert parse(render(terms)) == terms


def test_base_is_rendered_as_base() -> None:
    assert render(()) == "base"
    assert [str(term) for term in parse("a@2*0.00001+b*1")] == ["a@2*0.00001", "b"]


@pytest.mark.parametrize("name", ["a", "0", "A.b-c_d", "x" * 64, "Base", "1.5"])
def test_valid_and_invalid_names(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize("name", ["", "base", "-a", "_a", ".a", "a b", "a/b", "a+b", "a@b", "a\n", "é", "x" * 65])
def test_reserved_and_invalid_names_are_refused(name: str) -> None:
    assert name_fault(name)
