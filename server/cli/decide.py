"""`smolora decide`: answers with probabilities to the questions that an adapter was trained on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table
from rich.text import Text

from server.cli.common import (
    AdapterOption,
    JsonOption,
    KeyOption,
    UrlOption,
    connected,
    given,
    print_json,
    print_warnings,
    show,
)


def decide(
    text: Annotated[list[str], typer.Argument(help="The input. Give several to decide about each.")],
    adapter: AdapterOption = None,
    questions: Annotated[
        Path | None, typer.Option(help="A JSON file with a list of questions. Default: the adapter's own.")
    ] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Answer questions about a text with probabilities, such as which label it has."""
    body = {"input": text, **given(adapter=adapter, questions=None if questions is None else _read(questions))}
    with connected(url, api_key) as client:
        answer = client.decide(body)
    if as_json:
        print_json(answer)
        return
    results = cast("Sequence[Mapping[str, object]]", answer["results"])
    for asked, result in zip(text, results, strict=True):
        if len(text) > 1:
            typer.echo(asked)
        show(_table(cast("Sequence[Mapping[str, object]]", result["answers"])))
    print_warnings(cast("Sequence[str]", answer["warnings"]))


def _read(path: Path) -> object:
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="--questions") from None
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}", param_hint="--questions") from None
    return found


def _table(answers: Sequence[Mapping[str, object]]) -> Table:
    """Return a table of all options, most probable first; a question's first line has its name."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("question", "answer", "probability"):
        table.add_column(title, justify="right" if title == "probability" else "left")
    for number, answer in enumerate(answers, 1):
        name = str(answer["name"] or number)
        for option, probability in sorted(_options(answer), key=lambda pair: -pair[1]):
            table.add_row(Text(name), Text(option), f"{probability:.3f}")
            name = ""
    return table


def _options(answer: Mapping[str, object]) -> list[tuple[str, float]]:
    if answer["type"] == "predicate":
        yes = cast("float", answer["probability"])
        return [("yes", yes), ("no", 1 - yes)]
    options = cast("Sequence[Mapping[str, object]]", answer["probabilities"])
    label = "value" if answer["type"] == "choice" else "label"
    return [(_shown(option[label]), cast("float", option["probability"])) for option in options]


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
