"""The OpenAPI document describes all answers, including errors."""

import re
from pathlib import Path

import httpx
import pytest

from server.api.app import ROUTES
from server.api.openapi import App

pytestmark = pytest.mark.anyio


def test_every_error_has_our_form(app: App) -> None:
    document = app.openapi()
    schemas = {"Problem", "ErrorAnswer"} & set(document["components"]["schemas"])
    assert schemas == {"Problem", "ErrorAnswer"}
    assert "HTTPValidationError" not in str(document)
    for path, operations in document["paths"].items():
        is_openais = path.startswith("/v1/")
        media_type = "application/json" if is_openais else "application/problem+json"
        name = "ErrorAnswer" if is_openais else "Problem"
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status[0] in "45" and "content" in response:
                    assert response["content"] == {
                        media_type: {"schema": {"$ref": f"#/components/schemas/{name}"}}
                    }, (path, status)


def test_errors_of_any_route_are_documented(app: App) -> None:
    """Errors of any route: a foreign site, a bad body, an unknown project, an exhausted rate limit."""
    every = {"403", "408", "413", "415"}
    without_key = {"/health": {"200"} | every, "/ready": {"200", "503"} | every}
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            documented = set(operation["responses"])
            if path in without_key:
                assert documented == without_key[path]
            elif "4XX" not in documented:
                needs = ROUTES.find(path.replace("{", "").replace("}", "")).methods[method.upper()]
                counts = method != "get" or needs.counts or needs.is_list
                assert documented >= every | ({"401", "404"} | ({"429"} if counts else set())), (method, path)


def test_routes_that_need_a_key_declare_it_with_their_scopes(app: App) -> None:
    """So /docs has the button Authorize, and generated clients a parameter for the key."""
    document = app.openapi()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    keyless = set[str]()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            needed = ROUTES.find(path.replace("{", "").replace("}", "")).methods[method.upper()].scopes
            if needed is None:
                keyless.add(path)
                assert "security" not in operation
                continue
            *keyed, nothing = operation["security"]
            roles = [role for one in keyed for role in one["key"]]
            assert (set(roles), nothing) == (set() if path in ("/version", "/keys/self") else needed, {}), (
                method,
                path,
            )
    assert keyless == {"/health", "/ready"}


def test_the_page_has_every_status_of_an_error(app: App) -> None:
    page = (Path(__file__).parent.parent.parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d[\d, ]+) \|", page, re.MULTILINE)
    documented = {status for row in rows for status in row.split(", ")}
    operations = [operation for path in app.openapi()["paths"].values() for operation in path.values()]
    statuses = {status for operation in operations for status in operation["responses"]}
    assert documented == {status for status in statuses if status[0] in "45"} - {"4XX"}


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/adapters", "GET"),
        ("/adapters/a", "DELETE, GET, POST"),
        ("/adapters/a/1", "DELETE, GET"),
        ("/adapters/a/import", "POST"),
        ("/adapters/a/visibility", "PUT"),
        ("/adapters/a/aliases/b", "DELETE, PUT"),
        ("/train", "GET, POST"),
        ("/v1/files", "GET, POST"),
        ("/v1/models/acme/tweets", "DELETE, GET"),
    ],
)
async def test_parameters_of_paths(path: str, methods: str, client: httpx.AsyncClient) -> None:
    if path in ("/adapters/a/import", "/adapters/a/visibility"):
        for method in ("GET", "DELETE"):  # a version of that name would match
            assert (await client.request(method, path)).headers["allow"] == methods
    response = await client.options(path)
    assert (response.status_code, response.headers["allow"]) == (405, methods)
    document = response.json()
    said = document["error"]["message"] if path.startswith("/v1") else document["detail"]
    assert said == f"OPTIONS is not possible here: use {methods.replace(', ', ' or ')}"
