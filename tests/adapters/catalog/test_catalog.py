"""Tests of names, versions and aliases, also with concurrent writers."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import cast

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError

from adapters.catalog import catalog as module
from adapters.catalog.catalog import Catalog, Part, Version, combine
from adapters.catalog.reads import lookup
from adapters.catalog.versions import NewVersion
from adapters.catalog.writes import MAX_ALIASES, LatestMoved, publish_unattended_in
from adapters.errors import Conflict, InvalidInput, LimitReached, NotFound
from adapters.expression import Term, parse
from adapters.names import Viewpoint
from server.database import connect

D = [f"{i:064x}" for i in range(20)]


@pytest.fixture
def engine(tmp_path: Path, database_url: str | None) -> Iterator[sa.Engine]:
    engine = connect(tmp_path, url=database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def catalog(engine: sa.Engine) -> Catalog:
    return Catalog(engine)


def publish(catalog: Catalog, name: str, digest: str = D[0], warnings: Sequence[str] = ()) -> Version:
    return catalog.publish(
        name,
        digest=digest,
        rank=4,
        alpha=8,
        target_modules=("q_proj",),
        parameters=1 << 40,
        bytes=1 << 41,
        warnings=warnings,
    )


def test_a_version_reads_back_as_published(catalog: Catalog) -> None:
    before = datetime.now(UTC)
    version = catalog.publish(
        "tweets",
        digest=D[3],
        rank=16,
        alpha=0.1,
        target_modules=["q_proj", "down_proj"],
        parameters=5_000_000_000,
        bytes=20_000_000_001,
        base_model="smollm2-135m-instruct",
        metrics={"eval_loss": 1.25, "steps": 3},
        parent="codes@2",
        job_id="01J",
        warnings=["an 'odd' one", "é"],
    )
    assert catalog.version("tweets", 1) == version
    assert version == Version(
        name="tweets",
        version=1,
        digest=D[3],
        rank=16,
        alpha=0.1,
        target_modules=("q_proj", "down_proj"),
        parameters=5_000_000_000,
        bytes=20_000_000_001,
        created_at=version.created_at,
        base_model="smollm2-135m-instruct",
        metrics={"eval_loss": 1.25, "steps": 3},
        parent="codes@2",
        job_id="01J",
        warnings=("an 'odd' one", "é"),
    )
    assert before <= version.created_at <= datetime.now(UTC)
    assert version.created_at.utcoffset() == timedelta(0)


def test_warnings_of_a_public_merge_hide_private_parts(catalog: Catalog) -> None:
    """The warnings were stored with the names that its own project sees."""
    acme, other = catalog.of(Viewpoint("acme")), catalog.of(Viewpoint("other"))
    text = "its config names another base, x"
    kept = (f"secret@1: {text}", f"inner@1: for-a-customer@12: {text}", f"another.secret@3: {text}", "é")
    publish(acme, "merged", warnings=kept)
    acme.compose("mix", parse("merged"))
    for name in ("merged", "mix"):
        acme.set_visibility(name, True)
    assert acme.get("merged").versions[0].warnings == kept
    assert acme.get("mix").versions[0].warnings == tuple(f"merged@1: {text}" for text in kept)
    assert catalog.of(Viewpoint(sees_all=True)).version("acme/merged", 1).warnings == kept
    warnings = (text, "é")
    assert other.version("acme/merged", 1).warnings == warnings
    assert [adapter.versions[0].warnings for adapter in other.list(public=True)] == [warnings, warnings]
    other.compose("mine", parse("acme/mix*0.5"))
    assert other.get("mine").versions[0].warnings == tuple(f"acme/merged@1: {text}" for text in warnings)


def test_publishing_increments_the_version_and_moves_latest(catalog: Catalog) -> None:
    assert [publish(catalog, "a", D[i]).version for i in range(3)] == [1, 2, 3]
    assert publish(catalog, "b").version == 1
    adapter = catalog.get("a")
    assert adapter.latest == 3
    assert [version.digest for version in adapter.versions] == D[:3]
    assert adapter.aliases == {}


@pytest.mark.parametrize("name", ["", "base", "a b", "-a", "x" * 65, "a/b"])
def test_invalid_names_are_refused(name: str, catalog: Catalog) -> None:
    with pytest.raises(InvalidInput) as caught:
        publish(catalog, name)
    assert caught.value.errors[0].loc == ("name",)
    assert catalog.list() == []


def test_metrics_must_be_finite(catalog: Catalog) -> None:
    with pytest.raises(ValueError, match="finite"):
        catalog.publish(
            "a",
            digest=D[0],
            rank=1,
            alpha=1,
            target_modules=[],
            parameters=1,
            bytes=1,
            metrics={"x": float("nan")},
        )


def test_deleting_the_latest_moves_it_to_the_highest_remaining(catalog: Catalog) -> None:
    for i in range(4):
        publish(catalog, "a", D[i])
    assert catalog.delete_version("a", 2) == [D[1]]
    assert catalog.get("a").latest == 4
    assert catalog.delete_version("a", 4) == [D[3]]
    assert catalog.get("a").latest == 3
    assert catalog.delete_version("a", 3) == [D[2]]
    assert catalog.get("a").latest == 1
    assert catalog.delete_version("a", 1) == [D[0]]
    with pytest.raises(NotFound):
        catalog.get("a")
    assert catalog.list() == []


def test_latest_stays_at_an_older_version_after_a_rollback(catalog: Catalog) -> None:
    """Deleting other versions doesn't move it."""
    for i in range(3):
        publish(catalog, "a", D[i])
    catalog.point("a", "latest", 2)
    catalog.delete_version("a", 3)
    assert catalog.get("a").latest == 2
    assert catalog.resolve([Term("a")])[0].version == 2


def test_a_name_has_a_bounded_number_of_aliases(catalog: Catalog) -> None:
    publish(catalog, "a")
    for number in range(MAX_ALIASES):
        catalog.point("a", f"alias{number}", 1)
    with pytest.raises(LimitReached, match="at most 100 aliases: remove one first"):
        catalog.point("a", "another", 1)
    catalog.point("a", "alias0", 1)  # moves one
    catalog.unpoint("a", "alias0")
    catalog.point("a", "another", 1)


def unattended(engine: sa.Engine, digest: str, worse: str | None = None, alias: str | None = None) -> str:
    """Return why `latest` stays when a job publishes a version of "a"; "" if it moves."""
    new = NewVersion("a", digest, 1, 1.0, ("q_proj",), 1, 1)
    with engine.begin() as connection:
        _, stays = publish_unattended_in(connection, new, alias, None, worse=worse)
    return stays or ""


@pytest.mark.parametrize("alias", [None, "latest", "prod"])
def test_a_job_publishes_only_if_latest_is_the_compared_version(
    catalog: Catalog, engine: sa.Engine, alias: str | None
) -> None:
    """`compared_with` is the compared version. Others may delete it, move latest, or publish a newer version."""
    new = NewVersion("a", D[0], 1, 1.0, ("q_proj",), 1, 1)

    def publish_better(than: int | None) -> int:
        with engine.begin() as connection:
            return publish_unattended_in(connection, new, alias, None, than)[0].version

    def refused(than: int) -> None:
        with pytest.raises(LatestMoved):
            publish_better(than)

    refused(1)
    assert publish_better(0) == 1
    refused(0)
    refused(2)
    assert publish_better(1) == 2
    refused(1)
    catalog.point("a", "latest", 1)
    refused(2)
    assert publish_better(1) == 3
    assert publish_better(None) == 4
    catalog.delete("a", force=True)
    refused(4)
    assert publish_better(0) == 5


def test_a_job_does_not_undo_a_rollback(catalog: Catalog, engine: sa.Engine) -> None:
    for i in range(3):
        publish(catalog, "a", D[i])
    catalog.point("a", "latest", 2)
    warning = unattended(engine, D[3])
    assert warning.startswith(
        "latest stays at 2, where it was moved back to by hand; PUT /adapters/a/aliases/latest "
    )
    adapter = catalog.get("a")
    assert (adapter.latest, adapter.versions[-1].version) == (2, 4)
    assert unattended(engine, D[4], alias="prod").startswith("latest stays at 2")
    assert (catalog.get("a").latest, catalog.get("a").aliases) == (2, {"prod": 5})
    assert unattended(engine, D[5], alias="latest") == ""  # as the job expected
    assert (catalog.get("a").latest, catalog.get("a").aliases) == (6, {"prod": 5})
    assert unattended(engine, D[6]) == ""
    assert catalog.get("a").latest == 7


def roll_forward(catalog: Catalog) -> None:
    catalog.point("a", "latest", 3)


def delete_what_was_left_behind(catalog: Catalog) -> None:
    catalog.delete_version("a", 3)


def delete_what_it_was_moved_back_to(catalog: Catalog) -> None:
    catalog.delete_version("a", 2)


def publish_by_hand(catalog: Catalog) -> None:
    publish(catalog, "a", D[6])


@pytest.mark.parametrize(
    "act", [roll_forward, delete_what_was_left_behind, delete_what_it_was_moved_back_to, publish_by_hand]
)
def test_a_rollback_ends_once_latest_is_the_newest_again(
    act: Callable[[Catalog], None], catalog: Catalog, engine: sa.Engine
) -> None:
    for i in range(3):
        publish(catalog, "a", D[i])
    catalog.point("a", "latest", 2)
    act(catalog)
    assert unattended(engine, D[5]) == ""
    adapter = catalog.get("a")
    assert adapter.latest == adapter.versions[-1].version


def test_a_version_that_its_job_found_worse_leaves_latest(catalog: Catalog, engine: sa.Engine) -> None:
    worse = "worse than a@1: loss 2.0000 against 1.0000"
    assert unattended(engine, D[0], worse) == ""  # there is no latest to keep
    assert unattended(engine, D[1], worse) == (
        f"latest stays at 1: the new version is {worse}; PUT /adapters/a/aliases/latest moves it"
    )
    assert catalog.get("a").latest == 1
    assert unattended(engine, D[2]) == ""
    assert catalog.get("a").latest == 3
    assert unattended(engine, D[3], worse, alias="prod").startswith("latest stays at 3")
    assert (catalog.get("a").latest, catalog.get("a").aliases) == (3, {"prod": 4})
    assert unattended(engine, D[4], worse, alias="latest") == ""
    assert catalog.get("a").latest == 5


def test_composing_the_same_again_adds_no_version(catalog: Catalog) -> None:
    publish(catalog, "a")
    publish(catalog, "b", D[1])
    first = catalog.compose("mix", parse("a*0.5+b"))
    assert first[1] is True
    assert catalog.compose("mix", parse("b+a@1*0.25+a*0.25")) == (first[0], False)
    assert catalog.compose("mix", parse("a*0.5+b*0.5"))[0].version == 2
    assert catalog.compose("mix", parse("a*0.5+b"))[0].version == 3  # no longer those of the latest
    publish(catalog, "a", D[2])
    again, is_new = catalog.compose("mix", parse("a*0.5+b"))
    assert (again.version, is_new) == (4, True)  # a means another version


def test_version_numbers_are_never_reused(catalog: Catalog) -> None:
    publish(catalog, "a")
    publish(catalog, "a")
    catalog.delete_version("a", 2)
    assert publish(catalog, "a").version == 3
    catalog.delete("a")
    assert publish(catalog, "a").version == 4
    assert [version.version for version in catalog.get("a").versions] == [4]


def test_deletes_return_digests_without_versions(catalog: Catalog) -> None:
    for name, digest in (("a", D[0]), ("a", D[1]), ("a", D[0]), ("b", D[1]), ("a", D[2])):
        publish(catalog, name, digest)
    assert catalog.delete_version("a", 1) == []  # a@3 has the same bytes
    assert catalog.in_use(D[0])
    assert catalog.delete("a") == [D[0], D[2]]  # b@1 has D[1]
    assert not catalog.in_use(D[0])
    assert catalog.delete("b") == [D[1]]


def test_missing_adapters_versions_and_aliases_raise_not_found(catalog: Catalog) -> None:
    publish(catalog, "a")
    for call in (
        lambda: catalog.get("b"),
        lambda: catalog.version("a", 2),
        lambda: catalog.version("a", -1),
        lambda: catalog.version("a", 10**30),
        lambda: catalog.delete("b"),
        lambda: catalog.delete_version("a", 2),
        lambda: catalog.delete_version("a", 10**30),
        lambda: catalog.delete_version("b", 1),
    ):
        with pytest.raises(NotFound):
            call()
    assert catalog.list("b") == []


def test_contains_searches_names_as_the_project_sees_them(catalog: Catalog) -> None:
    acme = catalog.of(Viewpoint("acme"))
    for name in ("Tweets", "a_b", "axb", "acme"):
        publish(catalog, name)
    publish(acme, "retweets")
    acme.set_visibility("retweets", True)

    def found(of: Catalog, text: str, *, public: bool = False, after: str | None = None) -> list[str]:
        return [adapter.name for adapter in of.list(after=after, contains=text, public=public)]

    assert found(catalog, "tWEET") == ["Tweets"]
    assert found(catalog, "a_b") == ["a_b"], "no pattern"
    assert found(catalog, "%") == []
    assert found(catalog, "acme") == ["acme"]
    assert found(catalog, "b", after="a_b") == ["axb"]
    assert found(acme, "tweet") == ["retweets"]
    assert found(acme, "acme") == [], "its own names stand alone"
    assert found(catalog, "me/re", public=True) == ["acme/retweets"]
    assert found(acme, "me/re", public=True) == []
    everybodys = catalog.of(Viewpoint("acme", sees_all=True))
    assert found(everybodys, "tweets") == ["default/Tweets", "retweets"]
    assert found(everybodys, "default/") == ["default/Tweets", "default/a_b", "default/acme", "default/axb"]
    assert catalog.has_after("Tweets", contains="a")
    assert not catalog.has_after("Tweets", contains="t")


def test_lists_are_paged_by_name(catalog: Catalog) -> None:
    for name in ("b", "a", "d", "c", "b"):
        publish(catalog, name)
    publish(catalog, "0gone")
    catalog.delete("0gone")

    def names(name: str | None = None, limit: int | None = None, after: str | None = None) -> list[str]:
        return [adapter.name for adapter in catalog.list(name, limit, after)]

    assert names() == ["a", "b", "c", "d"]
    assert names(limit=2) == ["a", "b"]
    assert names(limit=2, after="b") == ["c", "d"]
    assert names(after="bb") == ["c", "d"]
    assert names(limit=0) == []
    assert names(name="b") == ["b"]
    assert names(name="b", after="b") == []
    assert [version.version for version in catalog.list("b")[0].versions] == [1, 2]


def test_terms_resolve_in_order(catalog: Catalog) -> None:
    for i in range(3):
        publish(catalog, "a", D[i])
    publish(catalog, "b", D[9])
    catalog.point("a", "prod", 2)
    parts = catalog.resolve(parse("b*0.5 + a + a@1*-1 + a@prod + a@latest + b@1"))
    assert parts == (
        Part("b", 1, D[9], 0.5),
        Part("a", 3, D[2], 1.0),
        Part("a", 1, D[0], -1.0),
        Part("a", 2, D[1], 1.0),
        Part("a", 3, D[2], 1.0),
        Part("b", 1, D[9], 1.0),
    )
    assert catalog.resolve(()) == ()
    assert catalog.get("a").aliases == {"prod": 2}


def test_unknown_terms_are_all_named(catalog: Catalog) -> None:
    publish(catalog, "a")
    publish(catalog, "tweets")
    catalog.point("a", "stable", 1)
    with pytest.raises(NotFound) as caught:
        catalog.resolve(parse(f"x+a+a@2+a@prod+x+twets@1+tweets@prod+a@{10**30}"))
    assert str(caught.value).split("; ") == [
        "no such adapter: x",
        "no such version: a@2 (a has version 1)",
        "no such alias: a@prod (a has stable)",
        "no such adapter: twets@1 (did you mean tweets?)",
        "no such alias: tweets@prod (tweets has none but latest)",
        f"no such version: a@{10**30} (a has version 1)",
    ]
    with pytest.raises(NotFound):
        catalog.resolve([Term("a", 10**30)])


def test_resolving_is_one_indexed_query(catalog: Catalog, engine: sa.Engine) -> None:
    publish(catalog, "a")
    catalog.point("a", "prod", 1)
    seen: list[tuple[str, tuple[object, ...]]] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *args: seen.append((args[2], args[3])))
    catalog.resolve(parse("+".join(["a", "a@1", "a@prod"] * 5)))
    ((statement, parameters),) = seen
    explain, place = ("EXPLAIN QUERY PLAN", 3) if engine.dialect.name == "sqlite" else ("EXPLAIN", 0)
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # a small table is scanned, too
        plan = connection.exec_driver_sql(f"{explain} {statement}", parameters).all()
    steps = [row[place] for row in plan if "SEARCH" in row[place] or "SCAN" in row[place].upper()]
    assert len(steps) == 25 + 15  # each lookup includes parts
    assert all(step.startswith("SEARCH") or "Index" in step for step in steps)


def test_aliased_versions_are_not_deleted(catalog: Catalog) -> None:
    publish(catalog, "a", D[0])
    publish(catalog, "a", D[1])
    catalog.point("a", "prod", 1)
    calls: list[Callable[[], object]] = [lambda: catalog.delete_version("a", 1), lambda: catalog.delete("a")]
    for call in calls:
        with pytest.raises(Conflict, match="a@prod"):
            call()
    assert len(catalog.get("a").versions) == 2
    assert catalog.delete_version("a", 2) == [D[1]]
    assert catalog.get("a").latest == 1


def test_threads_publish_distinct_versions(catalog: Catalog) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = sorted(pool.map(lambda i: publish(catalog, f"n{i % 2}", D[i % 20]).version, range(40)))
    assert numbers == sorted([*range(1, 21)] * 2)
    assert catalog.get("n0").latest == 20


def test_a_clashing_insert_is_retried(catalog: Catalog, engine: sa.Engine) -> None:
    """Another writer takes the name between our query and our insert. SQLite prevents that, so it is simulated."""
    clashes = ["", ""]

    def clash(connection: sa.Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO adapters ") and clashes:
            clashes.pop()
            raise IntegrityError(statement, None, Exception("another writer was first"))

    sa.event.listen(engine, "before_cursor_execute", clash)
    assert publish(catalog, "a").version == 1
    assert clashes == []
    assert len(catalog.get("a").versions) == 1


WORKER = """
import sys
from pathlib import Path
from adapters.catalog.catalog import Catalog
from server.database import connect
catalog = Catalog(connect(Path(sys.argv[1]), url=sys.argv[2] or None))
print("ready", flush=True)
sys.stdin.readline()
for i in range(25):
    version = catalog.publish("shared", digest="0" * 64, rank=1, alpha=1, target_modules=[], parameters=1, bytes=1)
    if i % 5 == 4:
        catalog.delete_version("shared", version.version)
    print(version.version, flush=True)
"""


def test_processes_publish_distinct_versions_despite_a_kill(tmp_path: Path, database_url: str | None) -> None:
    """Three processes create the database and publish concurrently; one of them is killed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), database_url or ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    streams = [(process.stdin, process.stdout) for process in processes]
    numbers: list[int] = []
    for _, stdout in streams:
        assert stdout is not None
        assert stdout.readline() == "ready\n"
    for stdin, _ in streams:
        assert stdin is not None
        print("go", file=stdin, flush=True)
    first = processes[0].stdout
    assert first is not None
    numbers += [int(first.readline()) for _ in range(5)]
    processes[0].kill()
    for process in processes:
        with process:
            assert process.stdout is not None
            numbers += map(int, process.stdout.read().split())  # `communicate` would lose the buffered lines
    assert [process.returncode for process in processes[1:]] == [0, 0]
    assert len(numbers) == len(set(numbers)) >= 55
    engine = connect(tmp_path, url=database_url)
    adapter = Catalog(engine).get("shared")
    assert adapter.latest == adapter.versions[-1].version
    published = {version.version for version in adapter.versions}
    assert len(published - set(numbers)) <= 1  # committed, but killed before it printed so
    engine.dispose()


def test_combine_is_canonical() -> None:
    parts = [Part("a", 1, D[2], 0.1), Part("b", 1, D[1], 2.0), Part("c", 7, D[2], 0.2)]
    assert combine(parts) == ((D[1], 2.0), (D[2], 0.3))
    assert combine([*parts, Part("d", 1, D[2], -0.3)]) == ((D[1], 2.0),)
    assert combine([Part("a", 1, D[0], 0.0), Part("a", 1, D[1], -0.0)]) == ()
    assert combine([]) == ()


@given(st.lists(st.tuples(st.sampled_from(D[:3]), st.decimals(-100, 100, places=3)), max_size=16), st.randoms())
@settings(deadline=None)
def test_combine_sums_exactly_in_any_order(pairs: list[tuple[str, float]], random: Random) -> None:
    parts = [Part("a", 1, digest, float(weight)) for digest, weight in pairs]
    combined = combine(parts)
    random.shuffle(parts)
    assert combine(parts) == combined
    sums = {digest: sum(weight for other, weight in pairs if other == digest) for digest, _ in pairs}
    assert dict(combined) == {digest: float(total) for digest, total in sums.items() if total}
    assert [digest for digest, _ in combined] == sorted(dict(combined))


def test_tables_and_queries_compile_for_postgresql() -> None:
    dialect = cast("Callable[[], sa.Dialect]", postgresql.dialect)()
    for table in module.metadata.sorted_tables:
        assert "CREATE TABLE" in str(sa.schema.CreateTable(table).compile(dialect=dialect))
    query = sa.union_all(*(lookup(i, term) for i, term in enumerate(parse("a+a@1+a@prod"))))
    assert str(query.compile(dialect=dialect)).count("UNION ALL") == 2
