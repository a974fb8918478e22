"""Tests of the names that requests may use for adapters in memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog
from adapters.catalog.reads import NamesByDigest
from adapters.expression import parse
from adapters.names import Viewpoint
from server.database import connect
from tests.adapters.catalog.test_catalog import D, publish


@pytest.fixture
def engine(tmp_path: Path, database_url: str | None) -> Iterator[sa.Engine]:
    engine = connect(tmp_path, url=database_url)
    yield engine
    engine.dispose()


def test_names_come_before_versions_and_aliases(engine: sa.Engine) -> None:
    catalog = Catalog(engine)
    for name, digest in (("tweets", D[0]), ("tweets", D[1]), ("twin", D[1]), ("news", D[2])):
        publish(catalog, name, digest)
    catalog.point("tweets", "prod", 1)
    names = NamesByDigest(engine)
    assert names([]) == []
    assert names([D[9]]) == []
    assert names([D[0]]) == ["tweets@1", "tweets@prod"]
    assert names([D[1]]) == ["tweets", "twin", "tweets@2", "twin@1"]
    assert names([D[2], D[0]]) == ["news", "news@1", "tweets@1", "tweets@prod"]
    catalog.point("tweets", "latest", 1)
    assert names([D[0]]) == ["tweets", "tweets@1", "tweets@prod"]
    assert names([D[1]]) == ["twin", "tweets@2", "twin@1"]


def test_names_of_other_projects_include_the_project(engine: sa.Engine) -> None:
    publish(Catalog(engine, of=Viewpoint("acme")), "tweets", D[0])
    assert NamesByDigest(engine)([D[0]]) == ["acme/tweets", "acme/tweets@1"]


def test_a_composition_is_listed_if_all_its_parts_are(engine: sa.Engine) -> None:
    catalog = Catalog(engine)
    publish(catalog, "tweets", D[0])
    publish(catalog, "news", D[1])
    catalog.compose("mix", parse("tweets*0.5+news", "expression"))
    names = NamesByDigest(engine)
    assert names([D[0]]) == ["tweets", "tweets@1"]
    assert names([D[0], D[1]]) == ["mix", "news", "tweets", "news@1", "tweets@1"]
    catalog.compose("mix", parse("tweets*0.25", "expression"))
    assert names([D[0]]) == ["mix", "tweets", "tweets@1"]
