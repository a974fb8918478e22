"""Wrong inputs and the exact answers, in an order meant for reading from top to bottom, as a user would.

`left` and `right` are adapters with one version each.
"""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.system.messages import program
from tests.end_to_end.server_process import ServerProcess

pytestmark = pytest.mark.real

JSON = {"Content-Type": "application/json"}
ROW = {"prompt": "a", "completion": "b"}
Sent = dict[str, Any]

OVER_HTTP: list[tuple[str, Sent, int, str]] = [
    # /generate
    (
        "POST /generate",
        {"json": {}},
        422,
        "prompt: give exactly one of prompt and messages; messages: give exactly one of prompt and messages",
    ),
    ("POST /generate", {"json": {"promt": "a"}}, 422, "promt: no such field: did you mean prompt?"),
    ("POST /generate", {"json": {"prompt": 5}}, 422, "prompt: must be a text"),
    ("POST /generate", {"json": {"prompt": ""}}, 422, "prompt: must not be empty"),
    (
        "POST /generate",
        {"json": {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}},
        422,
        "prompt: give exactly one of prompt and messages; messages: give exactly one of prompt and messages",
    ),
    (
        "POST /generate",
        {"json": {"messages": [{"role": "robot", "content": "a"}]}},
        422,
        "messages.0.role: must be 'system', 'user' or 'assistant'",
    ),
    (
        "POST /generate",
        {"json": {"prompt": "a", "temperature": -1, "n": 99}},
        422,
        "temperature: must be at least 0; n: must be at most 16",
    ),
    ("POST /generate", {"json": {"prompt": "a", "stream": "yes"}}, 422, "stream: must be true or false"),
    (
        "POST /generate",
        {"json": {"prompt": "a", "max_tokens": 5000}},
        422,
        "max_tokens: the prompt's 1 token and 5,000 more exceed the model's 512: 511 are left",
    ),
    ("POST /generate", {"json": {"prompt": "a", "stop": ["."] * 20}}, 422, "stop: must have at most 16 items"),
    ("POST /generate", {"json": {"prompt": "a", "regex": "("}}, 422, "regex: unclosed group"),
    # bodies
    (
        "POST /generate",
        {"content": b'{"prompt": "a",}', "headers": JSON},
        422,
        "body: is not JSON: trailing comma at line 1 column 16",
    ),
    (
        "POST /generate",
        {"content": b'{"prompt": "\xff"}', "headers": JSON},
        422,
        "body: is not UTF-8 text: invalid unicode code point at line 1 column 13",
    ),
    (
        "POST /generate",
        {"content": b'{"prompt": "a", "temperature": NaN}', "headers": JSON},
        422,
        "temperature: must be a number, neither NaN nor infinite",
    ),
    (
        "POST /generate",
        {"content": b"prompt=a", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        422,
        "body: must be a JSON object, sent with Content-Type: application/json",
    ),
    (
        "POST /generate",
        {"content": b" " * (3 << 20), "headers": JSON},
        413,
        "the body is larger than 2097152 bytes, the most that is accepted here",
    ),
    ("GET /generate", {}, 405, "GET is not possible here: use POST"),
    ("GET /generat", {}, 404, "no such path (did you mean /generate?): /docs lists them"),
    (
        "POST /chat/completions",
        {"json": {}},
        404,
        "no such path (the client's base URL must end with /v1): /docs lists them",
    ),
    # expressions
    (
        "POST /generate",
        {"json": {"prompt": "a", "adapter": "lefft"}},
        404,
        "no such adapter: lefft (did you mean left?)",
    ),
    (
        "POST /generate",
        {"json": {"prompt": "a", "adapter": "left@7"}},
        404,
        "no such version: left@7 (left has version 1)",
    ),
    (
        "POST /generate",
        {"json": {"prompt": "a", "adapter": "left@prod"}},
        404,
        "no such alias: left@prod (left has none but latest)",
    ),
    (
        "POST /generate",
        {"json": {"prompt": "a", "adapter": "left*500"}},
        422,
        "adapter: at character 6: weights go from -100 to 100",
    ),
    (
        "POST /generate",
        {"json": {"prompt": "a", "adapter": "left*1e-3"}},
        422,
        "adapter: at character 7: weights have no exponent: write 0.001, not 1e-3",
    ),
    (
        "POST /generate",
        {"json": {"prompt": "a", "adapter": "0.5*left"}},
        422,
        "adapter: at character 5: expected a weight such as 0.7 or -1, not "
        "'l'; a weight follows the name: tweets*0.7",
    ),
    (
        "POST /generate",
        {"json": {"prompt": "a", "adapter": "left right"}},
        422,
        "adapter: at character 6: expected \"+\" and another part, or the end, not 'r'",
    ),
    (
        "POST /generate",
        {"json": {"prompt": "a", "adapters": [{"name": "left", "version": 1, "alias": "prod"}]}},
        422,
        "adapters.0.alias: give version or alias, not both",
    ),
    # /compare
    (
        "POST /compare",
        {"json": {"prompt": "a", "adapter": "left"}},
        422,
        "adapters: is missing; adapter: no such field: did you mean adapters?",
    ),
    (
        "POST /compare",
        {"json": {"prompt": "a", "adapters": ["left", "lefft"]}},
        404,
        "no such adapter: lefft (did you mean left?)",
    ),
    # /train and data sets
    (
        "POST /train",
        {"json": {"name": "a"}},
        422,
        "data: give exactly one of data and dataset; dataset: give exactly one of data and dataset",
    ),
    (
        "POST /train",
        {"json": {"name": "my adapter", "data": [ROW]}},
        422,
        'name: must be 1 to 64 letters, digits, "_", "-" or ".", the first a letter or digit',
    ),
    (
        "POST /train",
        {"json": {"name": "a", "data": [ROW], "epochs": 3}},
        422,
        "epochs: no such field here: it belongs under training",
    ),
    (
        "POST /train",
        {"json": {"name": "a", "data": [ROW, {"promt": "a", "completion": "b"}]}},
        422,
        "data.1.prompt: is missing, and promt is no field: did you mean prompt?",
    ),
    (
        "POST /train",
        {"json": {"name": "a", "dataset": "ds-1"}},
        404,
        "dataset: no data set has this id: GET /datasets lists them",
    ),
    (
        "POST /train",
        {"json": {"name": "a", "data": [ROW], "lora": {"rank": 0}, "training": {"schedule": "cosin"}}},
        422,
        "lora.rank: must be at least 1; training.schedule: must be 'cosine', 'linear' or 'constant'",
    ),
    ("POST /train?dry_run=maybe", {"json": {"name": "a", "data": [ROW]}}, 422, "dry_run: must be true or false"),
    ("POST /datasets", {"files": {"file": ("rows.txt", b"a")}}, 422, "file: its name must end in .jsonl or .csv"),
    (
        "POST /datasets",
        {"files": {"file": ("rows.jsonl", b'{"promt": "a", "completion": "b"}')}},
        422,
        "line 1: prompt is missing, and promt is no field: did you mean prompt?",
    ),
    (
        "POST /datasets",
        {"files": {"file": ("rows.csv", b"prompt;completion\na;b\n")}},
        422,
        "file: line 1: the first line must name the columns prompt and "
        "completion, or messages, or text, separated by commas: save the table with commas",
    ),
    ("POST /datasets", {"files": {"files": ("rows.jsonl", b"{}")}}, 422, "files: no such field: there is file"),
    ("DELETE /datasets/ds-1", {}, 404, "no data set has this id: GET /datasets lists them"),
    ("POST /train/job-1/cancel", {}, 404, "there is no job job-1: GET /train lists them"),
    # adapters, aliases, compositions
    (
        "POST /adapters/mine",
        {"files": {"adapter_config": ("adapter_config.json", b"{}")}},
        422,
        "adapter_model: is missing: send both files, or one zip of both in archive",
    ),
    (
        "POST /adapters/mine",
        {"files": {"archive": ("mine.zip", b"no zip")}},
        422,
        "archive: is not a plain, complete zip file: put the two files that PEFT saved into one",
    ),
    ("GET /adapters/lefft", {}, 404, "no such adapter: lefft (did you mean left?)"),
    (
        "GET /adapters/left/one",
        {},
        422,
        "version: must be a whole number: another project's adapter is at /adapters?public=true&name=PROJECT/NAME",
    ),
    ("DELETE /adapters/left/7", {}, 404, "no such version: left@7 (left has version 1)"),
    (
        "PUT /adapters/left/aliases/prod",
        {"json": {"version": 7}},
        404,
        "no such version: left@7 (left has version 1)",
    ),
    (
        "PUT /adapters/left/aliases/7",
        {"json": {"version": 1}},
        422,
        "alias: is a number, which names a version: an alias has a letter",
    ),
    ("DELETE /adapters/left/aliases/latest", {}, 409, "latest can't be removed: point it at another version"),
    (
        "POST /compositions/mix",
        {"json": {"expression": "left*"}},
        422,
        "expression: at character 6: expected a weight such as 0.7 or -1, not the end",
    ),
    (
        "POST /compositions/left",
        {"json": {"expression": "right"}},
        409,
        "'left' is the name of an adapter: choose another one, or delete that first",
    ),
    (
        "POST /compositions/mix",
        {"json": {"expression": "left+right", "method": "tie"}},
        422,
        "method: must be 'ties', 'dare_linear', 'dare_ties', 'magnitude_prune' or 'svd'",
    ),
    (
        "POST /compositions/mix",
        {"json": {"expression": "left+right", "density": 0.5}},
        422,
        "density: is only for merges: leave it out, or set method",
    ),
    # /v1
    (
        "POST /v1/chat/completions",
        {"json": {"model": "lefft", "messages": [{"role": "user", "content": "a"}]}},
        404,
        "no such adapter: lefft (did you mean left?)",
    ),
    (
        "POST /v1/chat/completions",
        {"json": {"model": "base", "messages": [{"role": "user", "content": "a"}], "tools": [{}]}},
        400,
        "tools: is not supported here: leave it out (for JSON by a schema, give response_format)",
    ),
    (
        "POST /v1/completions",
        {"json": {"model": "base", "prompt": "a", "max_token": 5}},
        400,
        "max_token: no such field: did you mean max_tokens?",
    ),
    (
        "POST /v1/files",
        {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "assistants"}},
        400,
        'purpose: must be "fine-tune", once: other purposes are not supported',
    ),
    (
        "POST /v1/responses",
        {"json": {"model": "base", "input": "a"}},
        404,
        "no such path (did you mean /v1/chat/completions?): /docs lists them",
    ),
    ("POST /v1/embeddings", {"json": {"model": "base", "input": "a"}}, 404, "no such path: /docs lists them"),
]

ON_THE_COMMAND_LINE: list[tuple[str, str]] = [
    ("generat hello", "No such command 'generat'. Did you mean 'generate'?"),
    ("generate hello --temprature 1", "No such option: --temprature (Possible options: --temperature)"),
    ("generate hello --adapter lefft", "smolora: no such adapter: lefft (did you mean left?)"),
    ("generate hello --adapter left*500", "smolora: adapter: at character 6: weights go from -100 to 100"),
    ("generate hello --temperature 9", "smolora: temperature: must be at most 5"),
    (
        "chat hello --adapter left@prod --max-tokens 8",
        "smolora: no such alias: left@prod (left has none but latest)",
    ),
    ("train missing.jsonl --name a", "Invalid value for DATA: missing.jsonl: No such file or directory"),
    (
        "train bad.jsonl --name a",
        "smolora: line 1: prompt is missing, and promt is no field: did you mean prompt?\n"
        "smolora: file: line 2: is not JSON: Expecting ',' delimiter at character 15",
    ),
    ("train rows.jsonl --name base", "smolora: name: is the base's own name: choose another"),
    ("datasets upload rows.txt", "smolora: file: its name must end in .jsonl or .csv"),
    ("datasets delete ds-1", "smolora: no data set has this id: `smolora datasets` lists them"),
    ("adapters show lefft", "smolora: no such adapter: lefft (did you mean left?)"),
    (
        "adapters import missing --name mine",
        "Invalid value for PATH: missing doesn't exist; add --hub if it is on the hub",
    ),
    ("adapters delete left@7", "smolora: no such version: left@7 (left has version 1)"),
    ("adapters alias left prod 7", "smolora: no such version: left@7 (left has version 1)"),
    ("compose mix left*", "smolora: expression: at character 6: expected a weight such as 0.7 or -1, not the end"),
    ("jobs job-1", "smolora: there is no job job-1: `smolora jobs` lists them"),
    (
        "adapters --url http://127.0.0.1:9",
        "smolora: can't reach http://127.0.0.1:9: Connection refused; is it running? "
        "`smolora serve` starts it; if it listens elsewhere, set SMOLORA_URL or SMOLORA_PORT, or give --url",
    ),
    ("adapters --url server", "smolora: server is not a server's address, such as http://127.0.0.1:8000"),
]
FILES = {
    "bad.jsonl": '{"promt": "a", "completion": "b"}\n{"prompt": "a"\n',
    "rows.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "rows.txt": "a\n",
}


@pytest.mark.usefixtures("left", "right")
@pytest.mark.parametrize(("call", "sent", "status", "answer"), OVER_HTTP)
def test_over_http(server: ServerProcess, call: str, sent: Sent, status: int, answer: str) -> None:
    method, path = call.split()
    response = server.client.request(method, path, **sent)
    assert response.status_code == status
    document = response.json()
    said = document["error"]["message"] if "error" in document else document["detail"]
    assert said == answer
    for error in document.get("errors", []):
        assert error["message"] in said


@pytest.mark.usefixtures("left")
@pytest.mark.parametrize(("arguments", "answer"), ON_THE_COMMAND_LINE)
def test_on_the_command_line(
    server: ServerProcess, arguments: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    own = {"SMOLORA_URL": server.url, "COLUMNS": "200"}
    result = CliRunner().invoke(app, arguments.split(), env=own)
    assert result.exit_code in (1, 2)
    assert _said(result.stderr).replace(f"`{program()} ", "`smolora ") == answer


def _said(stderr: str) -> str:
    """Return the text inside the frame, if there is one."""
    framed = [line.strip("│ ") for line in stderr.splitlines() if line.startswith("│")]
    return "\n".join(framed) or stderr.rstrip()
