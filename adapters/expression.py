"""Adapter expressions: "tweets*0.7+movies@2*0.3" ⇄ a tuple of weighted references.

    expression = "base" | term ("+" term)*
    term       = [project "/"] name ["@" (integer | alias)] ["*" decimal]

Decimals have no exponent and may be negative. Spaces are allowed around "+" and "*" only. Names of adapters and
projects, and aliases, have 1 to 64 letters, digits, "_", "-" and ".", beginning with a letter or digit. An alias
can't consist of digits only, since digits denote a version. The parser doesn't check whether the names exist; the
catalog does.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import NoReturn

from adapters.errors import FieldError, InvalidExpression
from adapters.names import BASE, MAX_NAME, NAME

MAX_PARTS = 16
MAX_WEIGHT = 100.0
MAX_LENGTH = 4096

_DECIMAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


@dataclass(frozen=True)
class Term:
    """A weighted reference to a version of an adapter: its `version` or `alias`, or the latest if both are None.

    `str(term)` is text that `parse` reads.
    """

    name: str  # or project/name
    version: int | None = None
    alias: str | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        text = self.reference
        if self.weight != 1.0:
            text += f"*{Decimal(repr(self.weight)):f}"  # as short as repr, but without an exponent
        return text

    @property
    def reference(self) -> str:
        """The term without its weight, such as "name", "name@3" or "name@alias"."""
        if self.version is not None:
            return f"{self.name}@{self.version}"
        return self.name if self.alias is None else f"{self.name}@{self.alias}"


def parse(text: str, field: str = "adapter") -> tuple[Term, ...]:
    """Parse an adapter expression into its terms, in order. "base" has no terms.

    Raise InvalidExpression if the text doesn't follow the grammar. The error names `field`, and says what is
    wrong, at which character (counted from 1), and how to fix it.
    """
    return _Parser(text, field).expression()


def render(terms: Iterable[Term]) -> str:
    """Return the terms as an adapter expression. This is the inverse of `parse`."""
    return "+".join(map(str, terms)) or BASE


class _Parser:
    """A recursive-descent parser of `text`; `at` is the index of the next character."""

    def __init__(self, text: str, field: str) -> None:
        self.text = text
        self.field = field
        self.at = 0

    def expression(self) -> tuple[Term, ...]:
        if self.text == BASE:
            return ()
        if not self.text:
            self.fail('is empty: name an adapter, or write "base" for the frozen model')
        if len(self.text) > MAX_LENGTH:
            self.fail(f"is {len(self.text)} characters long, the most is {MAX_LENGTH}")
        terms = [self.term()]
        while self.at < len(self.text):
            self.separator("+")
            if len(terms) == MAX_PARTS:
                self.fail_here(f"there are at most {MAX_PARTS} parts, this begins one more")
            terms.append(self.term())
        return tuple(terms)

    def term(self) -> Term:
        start = self.at
        name = self.word("an adapter's name")
        project = ""
        if self.take("/"):
            project, name = f"{name}/", self.word("an adapter's name after its project's")
        version: int | None = None
        alias: str | None = None
        if self.take("@"):
            start_of_version = self.at
            word = self.word("a version (a number from 1) or an alias")
            if word.isdigit():
                version = int(word)
                if version == 0:
                    self.at = start_of_version
                    self.fail_here("versions count from 1")
            else:
                alias = word
        weight = self.weight()
        if name == BASE:
            self.at = start
            self.fail_here('"base" is the frozen model, always in the sum and without versions: leave it out')
        return Term(project + name, version, alias, weight)

    def word(self, what: str) -> str:
        match = NAME.match(self.text, self.at)
        if match is None:
            self.fail_here(f"expected {what}, which starts with a letter or digit, not {self.found()}")
        if len(match[0]) > MAX_NAME:
            self.fail_here(f"names have at most {MAX_NAME} characters, this one has {len(match[0])}")
        self.at = match.end()
        return match[0]

    def weight(self) -> float:
        before = self.at
        self.skip_spaces()
        if not self.take("*"):
            self.at = before
            return 1.0
        self.skip_spaces()
        match = _DECIMAL.match(self.text, self.at)
        if match is None:
            advice = "" if self.at == len(self.text) else "; a weight follows the name: tweets*0.7"
            self.fail_here(f"expected a weight such as 0.7 or -1, not {self.found()}{advice}")
        weight = float(match[0])
        if abs(weight) > MAX_WEIGHT:
            self.fail_here(f"weights go from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        self.at = match.end()
        if self.text[self.at : self.at + 1] in ("e", "E"):
            self.fail_here("weights have no exponent: write 0.001, not 1e-3")
        return weight

    def separator(self, sign: str) -> None:
        start = self.at
        self.skip_spaces()
        if not self.take(sign):
            if self.at == len(self.text):
                self.at = start
                self.fail_here("nothing may follow the last part: remove the space")
            self.fail_here(f'expected "+" and another part, or the end, not {self.found()}')
        self.skip_spaces()

    def skip_spaces(self) -> None:
        while self.text.startswith(" ", self.at):
            self.at += 1

    def take(self, sign: str) -> bool:
        if not self.text.startswith(sign, self.at):
            return False
        self.at += 1
        return True

    def found(self) -> str:
        return ascii(self.text[self.at]) if self.at < len(self.text) else "the end"

    def fail_here(self, message: str) -> NoReturn:
        self.fail(f"at character {self.at + 1}: {message}")

    def fail(self, message: str) -> NoReturn:
        raise InvalidExpression([FieldError((self.field,), message)])
