"""Chat templates: a base's Jinja program that renders a conversation as one text.

The text is exactly that of transformers' `apply_chat_template` for messages without tools and documents. Templates
expect the environment of transformers, so this module provides the same: blocks that leave no empty line, `break`
and `continue`, JSON without HTML escapes, the current date, `raise_exception`, and `generation` blocks around the
assistant's text. A template comes with a base and isn't trusted: it runs in Jinja's sandbox, gets only strings,
and can change nothing.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["ChatTemplate", "TemplateError"]


class ChatTemplate:
    """A template, compiled at its first use. Thread-safe."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Take the template's source. `special_tokens` are variables in the template, by their names, such as
        `eos_token`."""
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """Return the rendered text. Raise TemplateError if the template is invalid or rejects the messages."""
        return self._template.render(
            **self._special_tokens,
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

    @cached_property
    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "dict": _Dictionary(),
            "namespace": _Variables,
            "raise_exception": _refuse,
            "strftime_now": _now,
        }
        return environment.from_string(self.source)


class _Generation(Extension):
    """The block `{% generation %}…{% endgeneration %}` around the assistant's text. Its content is rendered."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dictionary:
    """The `dict` that templates can use, without the attributes of Python's class."""

    def __call__(self, *given: Iterable[tuple[str, object]], **named: object) -> dict[str, object]:
        return dict(*given, **named)

    def fromkeys(self, keys: Iterable[object], value: object = None) -> dict[object, object]:
        return dict.fromkeys(keys, value)


class _Variables(Namespace):
    """The template's `namespace`. Names with a leading underscore are refused, since Python uses them."""

    def __init__(*given: Any, **named: object) -> None:  # noqa: ANN401 (`self` may be a variable's name)
        self, *pairs = given
        Namespace.__init__(self)
        for name, value in dict(*pairs, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a template's variable can't be named {name!r}")
        Namespace.__setitem__(self, name, value)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(format: str) -> str:  # noqa: A002 (a template may name it)
    return datetime.now().strftime(format)
