"""What whoever started the server may try at once: something that a base of any size answers right."""

import json
import shlex

from server.config import Settings
from server.program import program

_QUESTION = "What is the capital of France?"
_START = "The capital of France is"
_OPTIONS = ("--max-tokens", "16", "--temperature", "0")
_KEY = "YOUR_KEY"
_OWN_URL = "http://{host}:{port}".format(
    **{name: Settings.model_fields[name].default for name in ("host", "port")}
)
"""Where commands look for a server that are told nothing."""


def first_prompts(url: str, is_chat: bool, needs_key: bool) -> list[str]:
    """The same in a command of ours and in one for curl. Where `is_chat` is False, a text to go on from."""
    command = ["chat", _QUESTION] if is_chat else ["generate", _START]
    place = [] if url == _OWN_URL else ["--url", url]
    key = f"SMOLORA_API_KEY={_KEY} " if needs_key else ""
    ours = f"{key}{program()} {shlex.join([*command, *_OPTIONS, *place])}"

    start = {"messages": [{"role": "user", "content": _QUESTION}]} if is_chat else {"prompt": _START}
    header = f" -H 'Authorization: Bearer {_KEY}'" if needs_key else ""
    body = shlex.quote(json.dumps({**start, "max_tokens": 16, "temperature": 0}))
    return [ours, f"curl -s {url}/generate{header} -H 'Content-Type: application/json' -d {body}"]
