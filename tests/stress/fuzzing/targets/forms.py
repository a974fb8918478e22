"""Multipart bodies of the three routes that accept them, through the whole application."""

import functools
from collections.abc import Mapping

from tests.server.api.adapters.peft_files import as_zip, peft_files
from tests.stress.fuzzing.app import MAX_REQUESTS, World, check_answer
from tests.stress.fuzzing.choices import TEXTS, Choices
from tests.stress.fuzzing.target import Target

PATHS = ("/adapters/a", "/datasets", "/v1/files")
BOUNDARY = b"x"
PIECES = (1 << 16, 1, 7, 1000)
TYPES = (
    b"multipart/form-data; boundary=x",
    b'multipart/form-data; boundary="x"',
    b"multipart/form-data; boundary=x; charset=utf-8",
    b"multipart/form-data; boundary=x; charset=undefined",
    b"multipart/form-data; boundary=",
    b"multipart/form-data",
    b"multipart/mixed; boundary=x",
    b"application/x-www-form-urlencoded",
    b"text/plain",
)
NAMES = (b"file", b"adapter_config", b"adapter_model", b"archive", b"purpose", b"surprise", b"", b"\xff", b'a"b')
FILENAMES = (
    b"rows.jsonl",
    b"rows.csv",
    b"adapter_config.json",
    b"",
    b"..",
    b"../x.jsonl",
    b"\xff.csv",
    b"a\\b.jsonl",
)
ROWS = (
    b'{"prompt": "a", "completion": "b"}\n',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    b"prompt,completion\na,b\n",
    b"text\n",
    b"fine-tune",
)
_RAW, _MADE = 0, 1


@functools.cache
def world() -> World:
    return World()


@functools.cache
def contents() -> tuple[bytes, ...]:
    config, tensors = peft_files()
    return (*ROWS, config, tensors, as_zip(config, tensors), b"", config[:-1], tensors[:-1])


def run(data: bytes) -> str:
    choices = Choices(data)
    is_made = choices.below(2) == _MADE
    path, piece = choices.pick(PATHS), choices.pick(PIECES)
    kind = choices.pick(TYPES) if choices.one_in(12) else TYPES[0]
    if choices.one_in(64):
        kind = choices.some()
    body = _made(choices) if is_made else choices.rest
    headers = [(b"content-type", kind), *([] if choices.one_in(8) else [(b"content-length", b"%d" % len(body))])]
    answer = world().call("POST", path, headers, body, piece=piece)
    check_answer(world().app, "POST", path, answer)
    return f"{answer.status}"


def _made(choices: Choices) -> bytes:
    body = choices.some() if choices.one_in(16) else b""
    for _ in range(1 + choices.below(10 if choices.one_in(16) else 3)):
        name, filename = choices.pick(NAMES), choices.pick(FILENAMES)
        content = choices.pick(contents())
        for _ in range(choices.below(3)):  # damage
            at = choices.below(max(1, len(content)))
            content = content[:at] + choices.take(choices.below(4)) + content[at + choices.below(3) :]
        body += part(name, None if choices.one_in(8) else filename, content, _more(choices))
    if choices.one_in(16):
        return body[: choices.below(max(1, len(body)))]
    return body + (choices.some() if choices.one_in(16) else b"--x--\r\n")


def _more(choices: Choices) -> bytes:
    if not choices.one_in(6):
        return b""
    text = choices.pick(TEXTS).encode("utf-8", "surrogatepass")
    return choices.pick(
        (
            b"Content-Type: text/plain; charset=" + text + b"\r\n",
            b"Content-Transfer-Encoding: base64\r\n",
            b"X: " + text + b"\r\n",
            b"Content-Disposition: form-data; name*=utf-8''" + text + b"\r\n",
            choices.some(),
            b"A: b\r\n" * 200,
            b"A" * 5000 + b": b\r\n",
        )
    )


def part(name: bytes, filename: bytes | None, content: bytes, more: bytes = b"") -> bytes:
    """Return one part of a body with the boundary before it."""
    file = b"" if filename is None else b'; filename="%s"' % filename
    return b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n%s\r\n%s\r\n' % (name, file, more, content)


def seeds() -> list[bytes]:
    config, tensors = peft_files()
    adapter: Mapping[bytes, bytes] = {b"adapter_config": config, b"adapter_model": tensors}
    bodies = [
        (0, b"".join(part(name, name, content) for name, content in adapter.items())),
        (0, part(b"archive", b"a.zip", as_zip(config, tensors))),
        (1, part(b"file", b"a.jsonl", b"".join(ROWS[:2]))),
        (1, part(b"file", b"a.csv", ROWS[2])),
        (2, part(b"file", b"a.jsonl", ROWS[0]) + part(b"purpose", None, b"fine-tune")),
        (2, part(b"purpose", None, b"batch")),
    ]
    raw = [bytes([_RAW, path, piece, 0, 0]) + body + b"--x--\r\n" for path, body in bodies for piece in (0, 2)]
    # Generated forms: for each part the indices of its name, file name and content.
    sound = [(0, [(1, 2, 5), (2, 0, 6)]), (0, [(3, 0, 7)]), (1, [(0, 0, 0)]), (1, [(0, 1, 2)])]
    made = [
        bytes([_MADE, path, 0, 0, 0, 0, 0, len(parts) - 1])
        + bytes(b for p in parts for b in (*p, 0, 0, 0))
        + b"\0\0"
        for path, parts in sound
    ]
    return [*raw, *made]


TARGET = Target(
    run,
    seeds,
    num_before=MAX_REQUESTS,
    max_len=8192,
    words=(
        b"--x\r\n",
        b"--x--\r\n",
        b"\r\n\r\n",
        b"Content-Disposition: form-data; name=",
        b'; filename="a.jsonl"',
        *NAMES[:5],
        b"fine-tune",
        b"filename*=utf-8''%FF",
        b"Content-Type: ",
        b"charset=utf-16",
        b"\r\n",
    ),
)
