"""`smolora generate`: text under an adapter, a blend, or none.

`smolora chat`: a conversation with the base, under an adapter, a blend, or none.

`smolora compare`: one prompt under several adapter expressions, side by side.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.cli.common import (
    SCRIPTS_WIDTH,
    ChatOption,
    JsonOption,
    KeyOption,
    MaxTokensOption,
    StopOption,
    TemperatureOption,
    TopPOption,
    UrlOption,
    connected,
    given,
    print_json,
    print_warnings,
    say_refused,
    start_of,
    suggestion,
)
from server.system.program import counted


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Such as tweets, tweets@3 or tweets*0.7+movies*0.3.")
    ] = None,
    chat: ChatOption = False,
    system: Annotated[str | None, typer.Option(help="What the answer should be like; means --chat.")] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: Annotated[int | None, typer.Option(help="Default: a random one.")] = None,
    stop: StopOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Continue a text, under an adapter, a weighted blend of several, or none. With --chat: answer a message.

    Text is continued just as it stands, which is what rows of prompt and completion were trained for. To have a
    question answered, use --chat or `smolora chat`.
    """
    sampling = given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None)
    body = {**start_of(prompt, chat, system), **given(adapter=adapter), **sampling}
    with connected(url, api_key) as client:
        if as_json:
            print_json(client.generate(body))
            return
        warnings: Sequence[str] = ()
        for event in client.stream(body):
            typer.echo(event.get("text", ""), nl=False)
            sys.stdout.flush()
            warnings = cast("Sequence[str]", event.get("warnings", warnings))
        typer.echo()
        print_warnings(warnings)
        if "prompt" in body and adapter is None and _is_question(prompt) and client.about().get("chat_template"):
            command = suggestion("chat", prompt, client=client)
            typer.echo(f"smolora: generate only continues a text; to have it answered: {command}", err=True)


def _is_question(prompt: str) -> bool:
    """Whether it looks like one to a model, rather than a text to go on from."""
    return prompt.rstrip().endswith("?") and "\n" not in prompt


if TYPE_CHECKING:
    from server.client.client import Client


def chat(
    message: Annotated[
        str | None, typer.Argument(help="One message, and its answer. Without it: a conversation, until Ctrl-D.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Such as tweets, tweets@3 or tweets*0.7+movies*0.3.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the answers should be like.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 512,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: Annotated[int | None, typer.Option(help="Default: a random one.")] = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Chat with the base, through its chat template."""
    from server.client.connection import ClientError

    options = given(adapter=adapter, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    turns = [] if system is None else [{"role": "system", "content": system}]
    with connected(url, api_key) as client:
        while (said := message if message is not None else _said()) is not None:
            own = {"role": "user", "content": said}
            try:
                answer = _answer(client, {"messages": [*turns, own], **options})
            except ClientError as error:
                if message is not None or not sys.stdin.isatty():
                    raise
                say_refused(error)  # the conversation stands, and what was said may be said again
                continue
            if message is not None:
                return
            turns += [own, {"role": "assistant", "content": answer}]


def _said() -> str | None:
    """The next message; None at the end."""
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


def _answer(client: "Client", body: dict[str, object]) -> str:
    """Print the answer as it comes; the whole of it."""
    text = ""
    warnings: list[str] = []
    for event in client.stream(body):
        warnings = cast("list[str]", event.get("warnings", warnings))
        piece = str(event.get("text", ""))
        text += piece
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
    print_warnings(warnings)
    return text


_WIDE = 3
"""Up to so many answers stand beside each other; more stand below each other."""


def compare(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", "-a", help="Such as base, tweets@3 or a*0.7+b*0.3; give several."),
    ],
    score: Annotated[
        list[str] | None,
        typer.Option("--score", "-s", help="How likely is this continuation? May be given more than once."),
    ] = None,
    chat: ChatOption = False,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: Annotated[int | None, typer.Option(help="Default: a random one, the same for all.")] = None,
    stop: StopOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Answer one prompt under several adapters at once, and show how likely each finds its answer."""
    sampling = given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None)
    body = {**start_of(prompt, chat), **given(adapters=adapter, score=score or None), **sampling}
    with connected(url, api_key) as client:
        answer = client.compare(body)
    if as_json:
        print_json(answer)
        return
    results = cast("Sequence[Mapping[str, object]]", answer["results"])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = SCRIPTS_WIDTH
    is_narrow = console.is_terminal and len(results) <= _WIDE
    console.print(_beside(results) if is_narrow else _below(results), crop=False)
    if score:
        console.print()
        console.print(_scores(results, score), crop=False)
    print_warnings([text for result in results for text in cast("Sequence[str]", result["warnings"])])


def _beside(results: Sequence[Mapping[str, object]]) -> Table:
    table = Table(pad_edge=False, header_style="bold")
    for result in results:
        table.add_column(Text(str(result["adapter"])), ratio=1, overflow="fold")
    table.add_row(*(_text(result) for result in results), end_section=True)
    table.add_row(*(_summary(result) for result in results))
    return table


def _below(results: Sequence[Mapping[str, object]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_lines=True)
    for title in ("adapter", "log-probability", "answer"):
        table.add_column(title, overflow="fold", no_wrap=title == "log-probability")
    for result in results:
        table.add_row(Text(str(result["adapter"])), _summary(result), _text(result))
    return table


def _scores(results: Sequence[Mapping[str, object]], texts: Sequence[str]) -> Table:
    """The log-probability of each text under each adapter; the highest of a row stands out."""
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


def _choice(result: Mapping[str, object]) -> Mapping[str, object]:
    return cast("Sequence[Mapping[str, object]]", result["choices"])[0]


def _text(result: Mapping[str, object]) -> Text:
    return Text(str(_choice(result)["text"]).strip())


def _summary(result: Mapping[str, object]) -> Text:
    usage = cast("Mapping[str, int]", result["usage"])
    return Text(
        f"{cast('float', result['logprob']):.2f} over {counted(usage['completion_tokens'], 'token')}", "dim"
    )
