"""What other projects see of a public version: of what it was made is for its own to know."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.catalog.catalog import Catalog, Version
from adapters.catalog.versions import Origin
from adapters.expression import parse
from adapters.viewpoint import Viewpoint
from server.database import connect

TEXT = "its config doesn't say which base it was trained on"


@pytest.fixture
def engine(tmp_path: Path, database_url: str | None) -> Iterator[sa.Engine]:
    engine = connect(tmp_path, url=database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def mine(engine: sa.Engine) -> Catalog:
    """Of a project that shares `merged`, which was made of what it doesn't share."""
    catalog = Catalog(engine, of=Viewpoint("acme"))
    inner = Origin.of([publish(catalog, "for-a-customer", 0, [TEXT])])
    publish(catalog, "inner", 1, inner.warnings)
    parts = [catalog.version("inner", 1), publish(catalog, "another.secret", 2, [TEXT])]
    publish(catalog, "merged", 3, Origin.of(parts).warnings)
    catalog.set_visibility("merged", is_public=True)
    return catalog


def publish(catalog: Catalog, name: str, seed: int, warnings: Sequence[str]) -> Version:
    return catalog.publish(
        name,
        digest=f"{seed:064x}",
        rank=4,
        alpha=8,
        target_modules=("q_proj",),
        parameters=1,
        bytes=1,
        parent="for-a-customer@1",
        warnings=warnings,
    )


def test_warnings_name_no_part_of_what_others_made(engine: sa.Engine, mine: Catalog) -> None:
    told = ("inner@1: for-a-customer@1: " + TEXT, "another.secret@1: " + TEXT)
    assert mine.version("merged", 1).warnings == told
    assert Catalog(engine, of=Viewpoint(sees_all=True)).version("acme/merged", 1).warnings == told
    other = Catalog(engine, of=Viewpoint("other"))
    assert other.version("acme/merged", 1).warnings == (TEXT,)
    assert [version.warnings for version in other.get("acme/merged").versions] == [(TEXT,)]


def test_nor_do_those_of_ones_own_blends_of_it(engine: sa.Engine, mine: Catalog) -> None:
    other = Catalog(engine, of=Viewpoint("other"))
    blend, _ = other.compose("blend", parse("acme/merged*0.5"))
    assert blend.warnings == (f"acme/merged@1: {TEXT}",)
    own, _ = mine.compose("blend", parse("merged*0.5"))
    assert own.warnings == tuple(f"merged@1: {text}" for text in mine.version("merged", 1).warnings)
