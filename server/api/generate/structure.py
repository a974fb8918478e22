"""What an answer must match: from a body's fields to a grammar that has been vetted."""

import json

from adapters.errors import FieldError, InvalidInput
from server.api.deps import Services
from server.api.schemas import ResponseFormatBody
from server.engine.request import Grammar, SamplingParams
from server.engine.structured.grammar import MAX_SCHEMA_BYTES

_ANY_OBJECT = '{"type":"object"}'


def grammar_of(form: ResponseFormatBody | None, regex: str | None = None) -> Grammar | None:
    """The grammar that the fields ask for; None for any text. Raises InvalidInput."""
    if regex is not None:
        if form is not None and form.type != "text":
            message = "give regex or response_format, not both"
            raise InvalidInput([FieldError((name,), message) for name in ("regex", "response_format")])
        return Grammar("regex", regex)
    if form is None:
        return None
    if (form.type == "json_schema") != (form.json_schema is not None):
        message = "goes with the type json_schema, and that with it"
        raise InvalidInput([FieldError(("response_format", "json_schema"), message)])
    if form.json_schema is None:
        return Grammar("json_schema", _ANY_OBJECT) if form.type == "json_object" else None
    source, message = "", ""
    try:
        source = json.dumps(form.json_schema.schema_, allow_nan=False)
        if len(source) > MAX_SCHEMA_BYTES:
            message = f"is longer than {MAX_SCHEMA_BYTES} bytes"
    except ValueError:
        message = "has a number that JSON does not have"
    if message:
        raise InvalidInput([FieldError(("response_format", "json_schema", "schema"), message)])
    return Grammar("json_schema", source)


async def check_grammar(services: Services, grammar: Grammar, sampling: SamplingParams) -> None:
    """Have a request's grammar vetted and compiled. Raises InvalidInput, or TryAgain where too many are being."""
    for name, is_given in (("stop", sampling.stop), ("ignore_eos", sampling.ignore_eos)):
        if is_given:
            raise InvalidInput.of(name, "does not go with a regex or a response_format: the answer ends by itself")
    if not services.guidance.is_usable(grammar):
        with services.metrics.refusals():
            await services.limiters.grammars.run(services.guidance.check, grammar)
