"""Structured output over the API: the engine's requests, and refusals with the field at fault."""

import asyncio
import json
import threading
from collections.abc import Mapping
from dataclasses import replace

import httpx
import pytest

from server.api.lanes import Lane, Turns
from server.engine.request import Grammar, SamplingParams
from tests.server.api.fakes import FakeEngine
from tests.server.conftest import MakeServices, client_of, new_app

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}, "required": ["b"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"regex": "[0-9]+"}, Grammar("regex", "[0-9]+")),
        ({"structured_outputs": {"choice": ["a+", "b c"]}}, Grammar("regex", r"a\+|b\ c")),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text"}, "regex": "a"}, Grammar("regex", "a")),
        ({"response_format": {"type": "json_object"}}, Grammar("json_schema", '{"type":"object"}')),
        ({"response_format": FORMAT}, Grammar("json_schema", json.dumps(SCHEMA))),  # keys in the given order
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            Grammar("json_schema", "{}"),
        ),
    ],
)
async def test_grammar_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, fields: Mapping[str, object], grammar: Grammar | None
) -> None:
    response = await client.post("/generate", json={"prompt": "a", "max_tokens": 1, **fields})
    assert response.status_code == 200, response.text
    assert engine.requests[0].grammar == grammar


async def test_known_grammar_does_not_wait_for_others(make_services: MakeServices) -> None:
    """It isn't refused either if too many others wait to be compiled."""
    services = make_services()
    grammars = Lane("grammars", "grammars", Turns(1), 0)
    services = replace(services, limiters=replace(services.limiters, grammars=grammars))
    body = {"prompt": "a", "max_tokens": 1}
    compiled = threading.Event()
    async with client_of(new_app(services)) as client:
        assert (await client.post("/generate", json={**body, "regex": "a+"})).status_code == 200
        compiling = asyncio.create_task(grammars.run("", compiled.wait, 10.0))
        try:
            await asyncio.sleep(0)
            assert (await client.post("/generate", json={**body, "regex": "a+"})).status_code == 200
            refused = await client.post("/generate", json={**body, "regex": "b+"})
            assert (refused.status_code, refused.json()["detail"]) == (429, "too many grammars wait")
        finally:
            compiled.set()
            await compiling
        assert (await client.post("/generate", json={**body, "regex": "b+"})).status_code == 200


async def test_penalties_and_biases_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {
        "prompt": "a",
        "seed": 1,
        "presence_penalty": 1.5,
        "frequency_penalty": -2,
        "logit_bias": {"5": -100, "17": 2.5},
    }
    assert (await client.post("/generate", json=body)).status_code == 200
    assert engine.requests[0].sampling == SamplingParams(
        seed=1, presence_penalty=1.5, frequency_penalty=-2.0, logit_bias=((5, -100.0), (17, 2.5))
    )


BAD: list[tuple[str, Mapping[str, object]]] = [
    ("regex", {"regex": ""}),
    ("regex", {"regex": 5}),
    ("regex", {"regex": "("}),
    ("regex", {"regex": "a" * 8193}),
    ("regex", {"regex": "a", "response_format": {"type": "json_object"}}),
    ("response_format", {"regex": "a", "response_format": {"type": "json_object"}}),
    ("response_format", {"response_format": "json"}),
    ("type", {"response_format": {"type": "yaml"}}),
    ("json_schema", {"response_format": {"type": "json_schema"}}),
    ("json_schema", {"response_format": {**FORMAT, "type": "json_object"}}),
    ("schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
    ("schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}}),
    ("schema", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}),
    ("schema", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}}}),
    ("schema", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "a" * 70_000}}}}),
    ("name", {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}}),
    ("structured_outputs", {"regex": "a", "structured_outputs": {"choice": ["a"]}}),
    ("response_format", {"response_format": FORMAT, "structured_outputs": {"choice": ["a"]}}),
    ("choice", {"structured_outputs": {"choice": []}}),
    ("choice", {"structured_outputs": {"choice": ["a"] * 257}}),
    ("choice", {"structured_outputs": {"choice": ["a" * 5000, "b" * 5000]}}),
    ("choice", {"structured_outputs": {}}),
    ("regex", {"structured_outputs": {"choice": ["a"], "regex": "a"}}),
    ("stop_token_ids", {"structured_outputs": {"choice": ["a"]}, "stop_token_ids": [5]}),
    ("min_tokens", {"regex": "a", "min_tokens": 1}),
    ("stop", {"regex": "a", "stop": "b"}),
    ("ignore_eos", {"regex": "a", "ignore_eos": True}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("frequency_penalty", {"frequency_penalty": float("nan")}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias", {"logit_bias": {"²": 1}}),
    ("logit_bias", {"logit_bias": {str(number): 1 for number in range(1025)}}),
    ("5", {"logit_bias": {"5": 101}}),
]


@pytest.mark.parametrize(("field", "fields"), BAD)
async def test_invalid_grammars_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, field: str, fields: Mapping[str, object]
) -> None:
    response = await client.post("/generate", content=json.dumps({"prompt": "a", **fields}), headers=JSON)
    assert response.status_code == 422
    assert field in {error["loc"][-1] for error in response.json()["errors"]}
    assert not engine.requests


JSON = {"Content-Type": "application/json"}
