"""`smolora generate`: text under an adapter, a blend, or none."""

import sys
from collections.abc import Sequence
from typing import Annotated, cast

import typer

from server.cli.common import (
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
    start_of,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Such as tweets, tweets@3 or tweets*0.7+movies*0.3.")
    ] = None,
    chat: ChatOption = False,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: Annotated[int | None, typer.Option(help="Default: a random one.")] = None,
    stop: StopOption = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Generate text, under an adapter, a weighted blend of several, or none."""
    sampling = given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None)
    body = {**start_of(prompt, chat), **given(adapter=adapter), **sampling}
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
