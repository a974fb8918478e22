"""Life of an adapter, from PEFT's files to PEFT's files: upload, list, serve, replace, delete while it is used."""

import io
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import MAX_NUM_SEQS, AdapterFiles
from tests.end_to_end.peft_reference import CONFIG, WEIGHTS, Reference
from tests.end_to_end.server_process import ServerProcess

pytestmark = pytest.mark.real

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
]
LONG_PROMPT = (
    "The harbour master wrote down the name of every ship that came in, where it came from and what it carried: "
    "first the three from the north with timber and tar, then a small one with oranges. That evening he"
)
"""A prompt of more than 32 tokens, so that two blocks of the KV cache can be shared."""


def test_peft_files_are_served_and_downloads_load_in_peft(
    exact_server: ServerProcess, reference: Reference, left: Path, tmp_path: Path
) -> None:
    (listed,) = exact_server.client.get("/adapters", params={"name": "left"}).json()["adapters"]
    (version,) = listed["versions"]
    assert (listed["latest"], version["version"], version["rank"]) == (1, 1, 4)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:  # one batch: it reads the weights once
        answers = list(
            pool.map(lambda prompt: exact_server.generate(prompt, adapter="left", max_tokens=12), PROMPTS)
        )
    for answer in answers:
        assert answer["adapters"] == [{"name": "left", "version": 1, "digest": version["digest"], "weight": 1.0}]

    download = exact_server.client.get("/adapters/left/1/download")
    assert download.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(download.content)) as archive:
        archive.extractall(tmp_path)
    uploaded, downloaded = load_file(left / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert uploaded.keys() == downloaded.keys()
    assert all(torch.equal(uploaded[name], downloaded[name]) for name in uploaded)
    texts = [answer["choices"][0]["text"] for answer in answers]
    with reference.adapter(tmp_path):
        assert texts == reference.texts(PROMPTS, 12, texts)
    base = exact_server.texts(PROMPTS, max_tokens=12)
    assert base == reference.texts(PROMPTS, 12, base)
    assert base != texts

    again = exact_server.client.post("/adapters/copy", files={"archive": ("left.zip", download.content)})
    assert again.status_code == 201
    assert again.json()["digest"] == version["digest"]


def test_slow_downloads_do_not_fill_memory(
    exact_server: ServerProcess, reference: Reference, adapter_files: AdapterFiles, tmp_path: Path
) -> None:
    directory = adapter_files.make(13, rank=64)
    size = (directory / WEIGHTS).stat().st_size
    assert size > 25_000_000
    exact_server.upload("large", directory)
    path = "/adapters/large/1/download"
    whole = exact_server.client.get(path).content
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        archive.extractall(tmp_path)
    texts = exact_server.texts(PROMPTS[:1], adapter="large", max_tokens=4)
    with reference.adapter(tmp_path):  # PEFT's from_pretrained reads it
        assert texts == reference.texts(PROMPTS[:1], 4, texts)

    process = psutil.Process(exact_server.process.pid)
    before = process.memory_info().rss
    with ExitStack() as connections:
        clients = [
            connections.enter_context(socket.create_connection(("127.0.0.1", exact_server.port))) for _ in range(8)
        ]
        for client in clients:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        pieces = [client.recv(1000) for client in clients]  # all downloads are in progress and unread
        assert process.memory_info().rss - before < 2 * size, "eight copies would be 250 MB"
        for client in clients[1:]:
            client.close()
        while piece := clients[0].recv(1 << 20):
            pieces.append(piece)
    first, rest = pieces[0], b"".join(pieces[8:])
    head, _, start = first.partition(b"\r\n\r\n")
    assert f"content-length: {len(whole)}".encode() in head.lower()
    assert start + rest == whole
    assert exact_server.client.delete("/adapters/large").status_code == 204


@pytest.mark.thorough  # engine only: server/engine/adapter_pool
def test_stream_outlives_its_deleted_adapter(exact_server: ServerProcess, adapter_files: AdapterFiles) -> None:
    digest = exact_server.upload("short-lived", adapter_files.make(11))["digest"]
    body: dict[str, Any] = {
        "adapter": "short-lived",
        "max_tokens": 120,
        "ignore_eos": True,
        "speculation": "off",
    }
    undisturbed = exact_server.text(PROMPTS[1], **body)
    with exact_server.stream(PROMPTS[1], **body) as events:
        pieces = [next(events)]
        assert exact_server.client.delete("/adapters/short-lived").status_code == 204
        exact_server.wait_for(requests_running=1)  # it arrived before the end
        assert exact_server.client.get("/adapters/short-lived").status_code == 404
        assert_unknown(exact_server, "short-lived")
        assert_unknown(exact_server, "short-lived@1")
        assert_unknown(exact_server, "left*0.5+short-lived*0.5")
        assert exact_server.stores(digest)
        pieces += events
    assert "".join(piece.get("text", "") for piece in pieces) == undisturbed
    assert pieces[-1]["usage"]["completion_tokens"] == 120
    exact_server.wait_until_idle()
    exact_server.wait_until_removed(digest)


def test_waiting_request_outlives_its_deleted_adapter(
    exact_server: ServerProcess, reference: Reference, adapter_files: AdapterFiles
) -> None:
    """A request that was accepted and waits for a place in the batch keeps its adapter after the deletion."""
    directory = adapter_files.make(12)
    with reference.adapter(directory):
        (expected,) = reference.texts(PROMPTS[1:2], 12)
    digest = exact_server.upload("unlucky", directory)["digest"]
    with ThreadPoolExecutor(1) as elsewhere:
        with exact_server.stream("One, two,", n=MAX_NUM_SEQS, max_tokens=400, ignore_eos=True) as running:
            next(running)
            waiting = elsewhere.submit(exact_server.text, PROMPTS[1], adapter="unlucky", max_tokens=12)
            exact_server.wait_for(requests_running=MAX_NUM_SEQS, requests_waiting=1)
            assert exact_server.client.delete("/adapters/unlucky/1").status_code == 204
            assert_unknown(exact_server, "unlucky")
            assert exact_server.stores(digest)
        assert waiting.result() == expected
    exact_server.wait_until_idle()
    exact_server.wait_until_removed(digest)


@pytest.mark.thorough
def test_replaced_weights_do_not_reuse_cached_blocks(
    exact_server: ServerProcess, reference: Reference, adapter_files: AdapterFiles
) -> None:
    old, new, newest = (adapter_files.make(seed) for seed in (13, 14, 15))
    expected = {}
    for directory in (old, new, newest):
        with reference.adapter(directory):
            expected[directory] = reference.texts([LONG_PROMPT], 8)[0]
    assert len(set(expected.values())) == 3

    def ask(adapter: str) -> tuple[str, int]:
        answer = exact_server.generate(LONG_PROMPT, adapter=adapter, max_tokens=8)
        return answer["choices"][0]["text"], answer["usage"]["cached_tokens"]

    exact_server.upload("swapped", old)
    assert ask("swapped") == (expected[old], 0)
    assert ask("swapped") == (expected[old], 32)
    assert exact_server.upload("swapped", new)["version"] == 2
    assert ask("swapped") == (expected[new], 0)
    assert ask("swapped") == (expected[new], 32)
    assert ask("swapped@1") == (expected[old], 32)
    assert exact_server.client.delete("/adapters/swapped").status_code == 204
    assert_unknown(exact_server, "swapped")
    assert exact_server.upload("swapped", newest)["version"] == 3
    assert ask("swapped") == (expected[newest], 0)
    assert ask("swapped*1.5")[1] == 0
    exact_server.upload("other-name", newest)
    assert ask("other-name") == (expected[newest], 32)


def test_unsupported_peft_adapters_are_refused_by_key(exact_server: ServerProcess, left: Path) -> None:
    config = (left / CONFIG).read_text(encoding="utf-8")
    for old, new in (('"use_dora": false', '"use_dora": true'), ('"bias": "none"', '"bias": "all"')):
        assert old in config
        config = config.replace(old, new)
    files = {"adapter_config": config.encode(), "adapter_model": (left / WEIGHTS).read_bytes()}
    response = exact_server.client.post("/adapters/refused", files=files)
    assert response.status_code == 422
    assert {error["loc"][-1] for error in response.json()["errors"]} == {"use_dora", "bias"}
    assert_unknown(exact_server, "refused")
    for name in ("base", "smollm2-135m-instruct", "-x"):
        response = exact_server.client.post(f"/adapters/{name}", files=files)
        assert response.status_code == 422
        assert [error["loc"][-1] for error in response.json()["errors"]] == ["name"]


def assert_unknown(server: ServerProcess, adapter: str) -> None:
    response = server.client.post("/generate", json={"prompt": "a", "adapter": adapter})
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
