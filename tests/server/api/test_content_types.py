"""Any Content-Type and any headers of form parts are answered, and never with a server error."""

import asyncio
import codecs
import encodings.aliases
import json

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Message

from tests.kits.properties import num_examples
from tests.server.api.adapters.peft_files import peft_files
from tests.server.api.fakes import http_scope

pytestmark = pytest.mark.anyio

FORMS = ["/adapters/a", "/datasets", "/v1/files"]
DOCUMENTS = [
    ("POST", "/generate"),
    ("POST", "/compare"),
    ("POST", "/tokenize"),
    ("POST", "/train"),
    ("POST", "/evaluate"),
    ("POST", "/compositions/m"),
    ("PUT", "/adapters/a/aliases/b"),
    ("POST", "/adapters/a/import"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/fine_tuning/jobs"),
]
CODECS = sorted({*encodings.aliases.aliases, *encodings.aliases.aliases.values(), "undefined", "idna", "punycode"})
CODECS += ["unicode_escape", "raw_unicode_escape", "no-such", "", "\0", "é", "a" * 4000, "utf-8\x7f", "../utf-8"]
ROW = b'{"prompt": "a", "completion": "b"}\n'

Answer = tuple[int, str, dict[str, object]]


async def call(app: FastAPI, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> Answer:
    """Return (status, media type, document) of a request sent as raw bytes, which clients would refuse to send."""
    sent: list[Message] = []
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def send(message: Message) -> None:
        sent.append(message)

    length = (b"content-length", b"%d" % len(body))
    await app(http_scope(method, path, [length, *headers]), inbox.get, send)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    media_type = dict(sent[0]["headers"])[b"content-type"].decode()
    return sent[0]["status"], media_type, json.loads(content)


def form(path: str, charset: bytes, disposition: bytes = b"", part_type: bytes = b"") -> tuple[bytes, bytes]:
    """Return (Content-Type, body) of a form that the route accepts, with more headers."""
    config, weights = peft_files()
    parts = {b"file": ROW} if path != "/adapters/a" else {b"adapter_config": config, b"adapter_model": weights}
    body = b""
    for name, content in parts.items():
        body += b'--x\r\nContent-Disposition: form-data; name="%s"; filename="%s.jsonl"%s\r\n' % (
            name,
            name,
            disposition,
        )
        body += part_type + b"\r\n" + content + b"\r\n"
    if path == "/v1/files":
        body += b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    return b"multipart/form-data; boundary=x" + charset, body + b"--x--\r\n"


def is_refused_well(path: str, answer: Answer) -> bool:
    """Return whether the answer is a 4xx in the path's own format that names the body."""
    status, media_type, document = answer
    if path.startswith("/v1"):
        error = document["error"]
        return (
            (status, media_type) == (400, "application/json")
            and isinstance(error, dict)
            and error["param"] == "body"
        )
    errors = document["errors"]
    assert isinstance(errors, list)
    return (status, media_type) == (422, "application/problem+json") and errors[0]["loc"] == ["body"]


@pytest.mark.parametrize("path", FORMS)
async def test_a_form_is_utf_8_or_refused(app: FastAPI, path: str) -> None:
    for charset in ("utf-8", "UTF-8", '"utf-8"', "utf8", "us-ascii", "iso-8859-1"):
        kind, body = form(path, f"; charset={charset}".encode())
        status, _, document = await call(app, "POST", path, [(b"content-type", kind)], body)
        assert status in (200, 201), (charset, document)
    for charset in ("undefined", "unicode_escape", "punycode", "utf-7", "utf-16", "no-such", '"undefined"', ""):
        kind, body = form(path, f"; charset={charset}".encode())
        answer = await call(app, "POST", path, [(b"content-type", kind)], body)
        assert is_refused_well(path, answer), (charset, answer)
        assert "charset" in json.dumps(answer[2])


@pytest.mark.parametrize("path", FORMS)
async def test_no_charset_is_a_fault_of_ours(app: FastAPI, path: str) -> None:
    names = [b"file", b"\\ud800", b"\\N{no}", b"+2AA-", b"\xff\xfe", b"\\"]
    for charset in CODECS:
        for name in names[: 6 if charset.startswith(("u", "raw")) else 2]:
            body = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n--x--\r\n' % (name, name)
            kind = f"multipart/form-data; boundary=x; charset={charset}".encode("latin-1")
            status, _, document = await call(app, "POST", path, [(b"content-type", kind)], body)
            assert 400 <= status < 500, (charset, name, document)


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize(
    "kind",
    [
        b"multipart/form-data; boundary=" + b"x" * 10_000,
        b"multipart/form-data; boundary=",
        b'multipart/form-data; boundary=""',
        b"multipart/form-data; boundary=\xff\xfe",
        b"multipart/form-data; boundary*=utf-8''x",
        b"multipart/form-data; boundary*0=x; boundary*1=y",
        b'multipart/form-data; boundary="x',
        b"multipart/form-data; boundary=y",
        b"multipart/form-data;",
        b";;;",
        b"",
        b"multipart/mixed; boundary=x",
        b"application/x-www-form-urlencoded; charset=undefined",
    ],
)
async def test_bad_boundaries(app: FastAPI, path: str, kind: bytes) -> None:
    _, body = form(path, b"")
    status, media_type, document = await call(app, "POST", path, [(b"content-type", kind)], body)
    assert 400 <= status < 500, document
    assert media_type == ("application/json" if path.startswith("/v1") else "application/problem+json")


TEXTS = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"utf-8", b"undefined", b"x", b'"', b'"x', b"''", b"utf-16''%FF", b"\\", b"", b"x" * 300]),
)
PARAMETERS = st.lists(
    st.tuples(
        st.sampled_from([b"charset", b"boundary", b"filename", b"filename*", b"name", b"name*", b"q"]), TEXTS
    ),
    max_size=4,
).map(lambda pairs: b"".join(b"; %s=%s" % pair for pair in pairs))
FUZZ = settings(
    max_examples=num_examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@pytest.mark.hypothesis
@pytest.mark.parametrize("path", FORMS)
def test_no_header_of_a_form_is_a_fault_of_ours(app: FastAPI, path: str) -> None:
    @FUZZ
    @given(PARAMETERS, PARAMETERS, PARAMETERS, st.booleans())
    def send(outer: bytes, inner: bytes, more: bytes, is_first: bool) -> None:
        kind, body = form(path, b"", inner, b"Content-Type: text/plain%s\r\n" % more)
        kind = b"multipart/form-data%s; boundary=x" % outer if is_first else kind + outer
        status, _, document = asyncio.run(call(app, "POST", path, [(b"content-type", kind)], body))
        assert status < 500, document

    send()


@pytest.mark.hypothesis
@pytest.mark.parametrize(("method", "path"), DOCUMENTS)
def test_no_content_type_of_json_is_a_fault_of_ours(app: FastAPI, method: str, path: str) -> None:
    @FUZZ
    @given(
        st.one_of(
            st.sampled_from([b"application/json", b"application/x+json", b"text/json", b"json"]), st.binary()
        ),
        PARAMETERS,
        st.one_of(st.sampled_from([b"{}", b"[]", b'{"a":"\xff"}', '{"a": 1}'.encode("utf-16")]), st.binary()),
    )
    def send(kind: bytes, parameters: bytes, body: bytes) -> None:
        status, _, document = asyncio.run(call(app, method, path, [(b"content-type", kind + parameters)], body))
        assert 400 <= status < 500, document

    send()


@pytest.mark.parametrize(("method", "path"), DOCUMENTS)
async def test_json_with_another_charset_is_refused(app: FastAPI, method: str, path: str) -> None:
    for charset in ("latin-1", "iso-8859-1", "utf-16", "utf-8-sig", "undefined", "unicode_escape", "no-such", ""):
        kind = [(b"content-type", f"application/json; charset={charset}".encode())]
        status, _, document = await call(app, method, path, kind, '{"prompt": "Ã©"}'.encode("latin-1"))
        assert status == 415, (charset, document)
        assert "must be UTF-8" in json.dumps(document)
        assert "leave charset out of Content-Type" in json.dumps(document)


@pytest.mark.parametrize(
    "charset", ["", "; charset=utf-8", ';charset="UTF-8"', "; charset=UTF8", "; charset=us-ascii"]
)
async def test_json_is_utf_8(app: FastAPI, charset: str) -> None:
    body = {"prompt": "é", "max_tokens": 1}
    kind = [(b"content-type", f"application/json{charset}".encode())]
    status, _, _ = await call(app, "POST", "/generate", kind, json.dumps(body, ensure_ascii=False).encode())
    assert status == 200
    for other in ("utf-16", "latin-1"):
        encoded = json.dumps(body, ensure_ascii=False).encode(other)
        status, _, document = await call(app, "POST", "/generate", kind, encoded)
        assert status == 422, document


def test_the_codecs_are_pythons() -> None:
    assert len(CODECS) > 300
    assert codecs.lookup("undefined").name == "undefined"
