"""Adapter expressions: refused, or parsed so that formatting and parsing them again gives the same."""

from adapters.errors import InvalidExpression
from adapters.expression import MAX_LENGTH, MAX_PARTS, Term, parse, render
from adapters.names import reference_fault
from tests.stress.fuzzing.target import Target, check_refusal


def run(data: bytes) -> str:
    text = data.decode("utf-8", "surrogateescape")
    try:
        terms = parse(text)
    except InvalidExpression as error:
        check_refusal(error, ("adapter",))
        return "refused"
    assert len(terms) <= MAX_PARTS
    for term in terms:
        assert reference_fault(term.name) is None
        assert term.version is None or (term.version > 0 and term.alias is None)
    rendered = render(terms)
    if len(rendered) <= MAX_LENGTH:  # ".5" is written "0.5": a text of the maximum length has grown
        assert parse(rendered) == terms
        assert render(parse(rendered)) == rendered
    return "read"


def seeds() -> list[bytes]:
    terms = [
        Term("tweets", weight=0.7),
        Term("team/movies", 2, None, -0.3),
        Term("a.b-c_d", None, "prod", 1e-7),
        Term("x" * 64, 10**12),
        Term(f"{'p' * 64}/{'n' * 64}", None, "latest"),
    ]
    texts = [
        "base",
        "a + b * .5",
        "a@01*007.50",
        *(str(term) for term in terms),
        render(terms),
        render(terms[:1] * 16),
    ]
    return [text.encode() for text in texts]


TARGET = Target(
    run,
    seeds,
    max_len=4200,
    words=(b"base", b"@", b"*", b"+", b"/", b" ", b"*-", b"*.5", b"@1", b"1e-3", b"\xd9\xa3"),
)
