"""JSON bodies that would block the event loop while they are parsed."""

import gc
import json

import httpx
import pytest

from server.api.strict_route import MAX_CONTAINERS, MAX_FIELDS, MAX_VALUES, check_shape

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
BODIES: dict[str, bytes] = {
    "100,003 arrays and objects": b'{"prompt":"x","z":[' + b"[]," * 100_000 + b"[]]}",
    "100,001 fields": b"{" + b",".join(b'"k%d":1' % number for number in range(100_001)) + b"}",
    "500,001 values": b'{"prompt":[' + b"1," * 500_000 + b"1]}",
    "500,002 strings": b'{"prompt":[' + b'"",' * 500_000 + b'""]}',
}


@pytest.mark.parametrize("count", BODIES)
async def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(
    client: httpx.AsyncClient, count: str
) -> None:
    for path in ("/generate", "/v1/completions", "/train"):
        response = await client.post(path, content=BODIES[count], headers=JSON)
        assert response.status_code == 413, response.text
        message = response.json()["error"]["message"] if path.startswith("/v1") else response.json()["detail"]
        assert message.startswith(f"the body has {count}, and may have ")
        assert ("POST /datasets" in message) == (path == "/train")


@pytest.mark.parametrize("text", ["[{,:" * 200_000, '\\"[{,:' * 100_000, '\\"' * 300_000, '[]{}:,\\\\"' * 90_000])
def test_brackets_in_strings_are_not_counted(text: str) -> None:
    check_shape(json.dumps({"prompt": text, "stop": [text]}).encode())
    with pytest.raises(Exception, match="arrays and objects"):
        check_shape(json.dumps([text, [[]] * MAX_CONTAINERS, text]).encode())


def test_bodies_at_the_bounds_are_parsed() -> None:
    check_shape(json.dumps([[]] * (MAX_CONTAINERS - 1)).encode())
    check_shape(json.dumps({str(number): 0 for number in range(MAX_FIELDS)}).encode())
    check_shape(json.dumps([1] * MAX_VALUES).encode())


async def test_no_garbage_is_collected_while_a_body_is_parsed(client: httpx.AsyncClient) -> None:
    """A collection per 700 new containers, over a growing heap, would take too long."""
    collections: list[object] = []

    def note(phase: str, info: object) -> None:
        collections.append((phase, info))

    body = b'{"prompt":"x","z":[' + b"[]," * 99_990 + b"[]]}"
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # Python's defaults; the tests' are higher
    gc.callbacks.append(note)
    try:
        response = await client.post("/generate", content=body, headers=JSON)
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*thresholds)
    assert response.status_code == 422
    assert gc.isenabled()
    assert len(collections) < 2 * 50  # the start and the end of each
