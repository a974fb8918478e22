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
    suggestion,
)


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
