"""`smolora generate`, `chat` and `compare`: text from the base model, alone or with adapters applied."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.cli.common import (
    SCRIPTS_WIDTH,
    AdapterOption,
    ChatOption,
    JsonOption,
    KeyOption,
    MaxTokensOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopPOption,
    UrlOption,
    connected,
    each_alone,
    given,
    print_json,
    print_warnings,
    say,
    say_refused,
    start_of,
    suggestion,
)
from server.system.messages import plural

if TYPE_CHECKING:
    from server.client.client import Client

_MAX_COLUMNS = 3
"""The most answers that `compare` shows side by side. If there are more, each answer is on a line of its own."""


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    adapter: AdapterOption = None,
    chat: ChatOption = False,
    system: Annotated[str | None, typer.Option(help="The system message; implies --chat.")] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Continue a text with one adapter, a weighted blend of several, or none. With --chat: answer a message.

    The text is continued as it is, which suits adapters trained on rows of prompt and completion. To get an answer
    to a question, use --chat or `smolora chat`.
    """
    sampling = given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None)
    body = {**start_of(prompt, chat, system), **given(adapter=adapter), **sampling}
    with connected(url, api_key) as client:
        if as_json:
            print_json(client.generate(body))
            return
        _print_answer(client, body)
        if "prompt" in body and adapter is None and _is_question(prompt) and client.about().get("chat_template"):
            command = suggestion("chat", prompt, client=client)
            say(f"generate only continues a text; to have it answered: {command}")


def chat(
    message: Annotated[
        str | None, typer.Argument(help="A message to answer. Without it: a conversation, until Ctrl-D.")
    ] = None,
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Chat with the base model, with one adapter, a blend of several, or none."""
    from server.client.connection import ClientError

    options = given(adapter=adapter, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    turns = [] if system is None else [{"role": "system", "content": system}]
    if message is None and sys.stdin.isatty():
        say("Ctrl-D ends the conversation")
    with connected(url, api_key) as client:
        while (text := message if message is not None else _next_message()) is not None:
            turn = {"role": "user", "content": text}
            try:
                answer = _print_answer(client, {"messages": [*turns, turn], **options})
            except ClientError as error:
                if message is not None or not sys.stdin.isatty():
                    raise
                say_refused(error)  # the conversation is unchanged: the user may try again
                continue
            if message is not None:
                return
            turns += [turn, {"role": "assistant", "content": answer}]


def compare(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", "-a", help="Such as base, tweets@3 or a*0.7+b*0.3. Give several."),
    ],
    score: Annotated[
        list[str] | None,
        typer.Option("--score", "-s", help="A continuation to score. May be given more than once."),
    ] = None,
    chat: ChatOption = False,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: Annotated[int | None, typer.Option(help="Default: random, and the same for all.")] = None,
    stop: StopOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Answer a prompt under several adapters at once, with each answer's log-probability."""
    sampling = given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None)
    body = {**start_of(prompt, chat), **given(adapters=each_alone(adapter), score=score or None), **sampling}
    with connected(url, api_key) as client:
        answer = client.compare(body)
    if as_json:
        print_json(answer)
        return
    results = cast("Sequence[Mapping[str, object]]", answer["results"])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = SCRIPTS_WIDTH
    has_columns = console.is_terminal and len(results) <= _MAX_COLUMNS
    console.print(_columns(results) if has_columns else _lines(results), crop=False)
    if score:
        console.print()
        console.print(_scores(results, score), crop=False)
    print_warnings([text for result in results for text in cast("Sequence[str]", result["warnings"])])


def _is_question(prompt: str) -> bool:
    """Return whether the prompt looks like a question rather than a text to continue."""
    return prompt.rstrip().endswith("?") and "\n" not in prompt


def _next_message() -> str | None:
    """Read a message from stdin. Return None at the end of the input."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise typer.BadParameter(f"is not in {error.encoding}", param_hint="standard input") from None
        if not line:
            return None
        if line.strip():
            return line.rstrip("\n")


def _print_answer(client: "Client", body: Mapping[str, object]) -> str:
    """Print the answer as it arrives, then its warnings on stderr. Return its text."""
    text = ""
    warnings: Sequence[str] = ()
    for event in client.stream(body):
        warnings = cast("Sequence[str]", event.get("warnings", warnings))
        piece = str(event.get("text", ""))
        text += piece
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
    print_warnings(warnings)
    return text


def _columns(results: Sequence[Mapping[str, object]]) -> Table:
    """Return a table with a column for each answer."""
    table = Table(pad_edge=False, header_style="bold")
    for result in results:
        table.add_column(Text(str(result["adapter"])), ratio=1, overflow="fold")
    table.add_row(*(_text(result) for result in results), end_section=True)
    table.add_row(*(_summary(result) for result in results))
    return table


def _lines(results: Sequence[Mapping[str, object]]) -> Table:
    """Return a table with a line for each answer."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_lines=True)
    for title in ("adapter", "log-probability", "answer"):
        table.add_column(title, overflow="fold", no_wrap=title == "log-probability")
    for result in results:
        table.add_row(Text(str(result["adapter"])), _summary(result), _text(result))
    return table


def _scores(results: Sequence[Mapping[str, object]], texts: Sequence[str]) -> Table:
    """Return a table of the log-probability of each text under each adapter.

    Each text's highest log-probability is in bold.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("text")
    for result in results:
        table.add_column(Text(str(result["adapter"])), justify="right")
    for number, text in enumerate(texts):
        scores = [cast("Sequence[Mapping[str, float]]", result["scores"])[number] for result in results]
        values = [score["logprob"] for score in scores]
        styles = ["bold" if value == max(values) else "" for value in values]
        numbers = [Text(f"{value:.2f}", style) for value, style in zip(values, styles, strict=True)]
        table.add_row(Text(text), *numbers)
    return table


def _text(result: Mapping[str, object]) -> Text:
    choice = cast("Sequence[Mapping[str, object]]", result["choices"])[0]
    return Text(str(choice["text"]).strip())


def _summary(result: Mapping[str, object]) -> Text:
    usage = cast("Mapping[str, int]", result["usage"])
    return Text(
        f"{cast('float', result['logprob']):.2f} over {plural(usage['completion_tokens'], 'token')}", "dim"
    )
