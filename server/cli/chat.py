"""`smolora chat`: a conversation with the base, under an adapter, a blend, or none."""

import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from server.cli.common import (
    KeyOption,
    TemperatureOption,
    TopPOption,
    UrlOption,
    connected,
    given,
    print_warnings,
    say_refused,
)

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
