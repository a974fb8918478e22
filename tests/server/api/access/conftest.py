"""Run tests of keys, projects and usage on both databases."""

import pytest


@pytest.fixture
def app_database_url(database_url: str | None) -> str | None:
    return database_url
