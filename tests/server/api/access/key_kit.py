"""Clients of one application with keys of several projects."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
from fastapi import FastAPI

from server.access.access import Access
from server.access.principal import OPERATOR, Quota, Scope
from tests.server.conftest import client_of

OPERATORS = "operators-0123456789"
"""Keys for the setting API_KEYS."""


def access_of(app: FastAPI) -> Access:
    """Return the application's access control."""
    access = app.state.services.access
    assert isinstance(access, Access)
    return access


def new_secret(
    app: FastAPI,
    project: str = "default",
    scopes: Sequence[Scope] = ("generate", "train"),
    quota: Quota | None = None,
) -> str:
    """Return the secret of a key created by a command on HOME."""
    _, secret = access_of(app).keys.create("test", who=OPERATOR, project=project, scopes=scopes, quota=quota)
    return secret


@asynccontextmanager
async def client_with(app: FastAPI, secret: str) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client that sends this key."""
    async with client_of(app) as client:
        client.headers["Authorization"] = f"Bearer {secret}"
        yield client


@dataclass(frozen=True)
class Projects:
    """A client of each of two projects, and the operator's."""

    acme: httpx.AsyncClient
    other: httpx.AsyncClient
    operator: httpx.AsyncClient


@asynccontextmanager
async def two_projects(app: FastAPI) -> AsyncIterator[Projects]:
    """Create the projects acme and other, and an operator of the default project."""
    async with (
        client_with(app, new_secret(app, "acme")) as acme,
        client_with(app, new_secret(app, "other")) as other,
        client_with(app, new_secret(app, scopes=["admin"])) as operator,
    ):
        yield Projects(acme, other, operator)
