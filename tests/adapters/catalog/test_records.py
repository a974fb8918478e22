"""Records have all that the catalog knows, and recovery handles a change that was interrupted anywhere."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from adapters.catalog.catalog import Catalog, NewVersion, Part, Version
from adapters.catalog.records import Recorder, Records, decode, encode
from adapters.catalog.recovery import Recovered, recover
from adapters.catalog.writes import drop_in, publish_in, recording
from adapters.errors import BytesUnavailable, NotFound
from adapters.expression import parse
from adapters.names import Viewpoint
from adapters.sql import transact
from server.database import FILE_NAME, connect
from tests.kits.buckets import EITHER, Failure, Proxy

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

D = [f"{i:064x}" for i in range(20)]


class Home:
    """A catalog with records, whose database can be lost."""

    def __init__(self, root: Path, records: Records) -> None:
        self.root = root
        self.records = records
        self.open()

    def open(self) -> None:
        self.engine = connect(self.root)
        self.catalog = Catalog(self.engine, self.records)

    def lose(self) -> None:
        self.engine.dispose()
        for path in self.root.glob(f"{FILE_NAME}*"):
            path.unlink()
        self.open()

    def publish(
        self,
        name: str,
        digest: str = D[0],
        job_id: str | None = None,
        metrics: Mapping[str, float] | None = None,
        config: Mapping[str, object] | None = None,
    ) -> Version:
        return self.catalog.publish(
            name,
            digest=digest,
            rank=4,
            alpha=8,
            target_modules=("q_proj",),
            parameters=10,
            bytes=100,
            job_id=job_id,
            metrics=metrics or {"eval_loss": 0.1},
            base_digest=D[9],
            config=config or {"lora": {"rank": 4, "names": ["q_proj"]}},
            warnings=["é"],
        )

    def recover(self, lost: Collection[str] = (), known: Collection[str] = ()) -> Recovered:
        return recover(self.engine, self.records, lambda digest: digest not in lost, known.__contains__)

    def names(self) -> list[str]:
        return [f"{v.name}@{v.version}" for adapter in self.catalog.list() for v in adapter.versions]


@pytest.fixture(params=EITHER)
def records(request: pytest.FixtureRequest, tmp_path: Path) -> Records:
    root = tmp_path / "adapters"
    if request.param == "directory":
        return Records(root)
    bucket = request.getfixturevalue("bucket")
    return Records(root, bucket.under("adapters"))


@pytest.fixture
def home(tmp_path: Path, records: Records) -> Iterator[Home]:
    home = Home(tmp_path, records)
    yield home
    home.engine.dispose()


def new(name: str, job_id: str | None = None) -> NewVersion:
    return NewVersion(name, D[7], 1, 1.0, ("q_proj",), 1, 1, job_id=job_id)


class Killed(BaseException):
    """Raised instead of a kill, so that the transaction isn't committed."""


def cut_off_publication(home: Home, name: str, job_id: str | None = None) -> None:
    """Write the record, and be killed before the commit."""

    def work(connection: sa.Connection) -> None:
        publish_in(connection, new(name, job_id), records=Recorder(home.records))
        raise Killed

    with pytest.raises(Killed):
        transact(home.engine, work)


def test_a_record_round_trips_a_version() -> None:
    version = Version(
        name="a.b-c",
        version=12,
        digest=D[1],
        rank=3,
        alpha=0.1,
        target_modules=("q_proj", "up_proj"),
        parameters=1 << 40,
        bytes=1 << 41,
        base_model="bäse",
        metrics={"eval_loss": 1.25, "steps": 3},
        parent="x@1*0.5+y@2",
        job_id="job-1",
        warnings=("one", "two"),
        base_digest=D[2],
        data_digest=D[3],
        config={"lora": {"names": ["a"], "none": None}},
        created_at=datetime(2025, 3, 4, 5, 6, 7, 89, tzinfo=UTC),
        parts=(Part("x", 1, D[4], 0.5), Part("y", 2, D[5], 1.0)),
    )
    assert decode(encode(version)) == version


def test_everything_but_aliases_and_latest_is_rebuilt(home: Home) -> None:
    for digest in D[:3]:
        home.publish("a", digest, job_id="job-x")
    home.publish("b", D[3])
    home.catalog.compose("mix", parse("a@2*0.5 + b*-0.25"))
    home.catalog.compose("mix", parse("mix*2 + a@1"))
    home.catalog.point("a", "prod", 2)
    home.catalog.point("a", "latest", 1)
    home.catalog.point("mix", "latest", 1)
    before = {adapter.name: adapter.versions for adapter in home.catalog.list()}
    home.lose()
    assert home.catalog.list() == []
    assert home.recover() == Recovered(adopted=("a@1", "a@2", "a@3", "b@1", "mix@1", "mix@2"))
    after = home.catalog.list()
    assert {adapter.name: adapter.versions for adapter in after} == before
    assert {adapter.name: adapter.latest for adapter in after} == {"a": 3, "b": 1, "mix": 2}
    assert all(adapter.aliases == {} for adapter in after)
    assert [adapter.kind for adapter in after] == ["adapter", "adapter", "composition"]
    assert home.recover() == Recovered()


def test_owners_are_rebuilt(home: Home) -> None:
    """Two projects have an adapter each, and there is a composition of both. Version numbers are restored, too."""
    acme = home.catalog.of(Viewpoint("acme", key_id="key-1"))
    for catalog, digest in ((home.catalog, D[0]), (acme, D[1]), (acme, D[2])):
        catalog.publish("a", digest=digest, rank=4, alpha=8, target_modules=("q_proj",), parameters=1, bytes=1)
    acme.delete_version("a", 2)
    home.catalog.set_visibility("a", True)
    acme.compose("mix", parse("a*0.5+default/a"))
    before = acme.list()
    home.lose()
    assert home.recover() == Recovered(adopted=("a@1", "acme/a@1", "acme/mix@1"))
    acme = home.catalog.of(acme.viewpoint)
    assert acme.list() == before
    assert acme.get("a").versions[0].key_id == "key-1"
    assert [part.name for part in acme.get("mix").versions[0].parts] == ["a", "default/a"]
    assert [adapter.name for adapter in home.catalog.list()] == ["a"]
    assert home.catalog.list(public=True) == []
    again = acme.publish("a", digest=D[2], rank=4, alpha=8, target_modules=("q_proj",), parameters=1, bytes=1)
    assert again.version == 3
    with pytest.raises(NotFound, match="no longer shares: default/a@1"):
        acme.resolve(parse("mix"))


def test_latest_of_a_rebuilt_name_is_what_its_jobs_made_it(home: Home) -> None:
    """A job's verdict counts, not losses; of an older release, without verdicts, the base's loss counts."""
    worse = {"eval_loss": 3.0, "base_eval_loss": 2.0}
    home.publish("a", D[0], metrics={"eval_loss": 1.0, "base_eval_loss": 2.0})
    home.publish("a", D[1], metrics=worse)
    home.publish("b", D[2], metrics=worse, config={"publish_metric": "loss"})
    home.publish("b", D[3], metrics=worse, config={"publish_metric": "loss", "verdict": "can't tell"})
    home.publish("b", D[4], config={"publish_metric": "loss", "verdict": "worse"})
    home.publish("c", D[5])
    home.publish("c", D[6], config={"publish_metric": "loss", "verdict": "worse", "alias": "latest"})
    home.lose()
    home.recover()
    assert {name: home.catalog.get(name).latest for name in "abc"} == {"a": 1, "b": 2, "c": 2}


def test_numbers_of_deleted_versions_are_not_reused(home: Home) -> None:
    for _ in range(3):
        home.publish("a")
    home.publish("gone")
    home.catalog.delete("gone")
    home.catalog.delete_version("a", 3)
    home.catalog.delete_version("a", 2)
    home.lose()
    home.recover()
    assert home.names() == ["a@1"]
    assert home.publish("a").version == 4
    assert home.publish("gone").version == 2
    home.lose()
    home.recover()
    assert home.names() == ["a@1", "a@4", "gone@2"]


def test_versions_without_records_get_them(home: Home) -> None:
    without = Catalog(home.engine)
    for digest in D[:2]:
        without.publish("a", digest=digest, rank=1, alpha=1, target_modules=[], parameters=1, bytes=1)
    assert home.recover() == Recovered(num_written=2)
    home.lose()
    assert home.recover().adopted == ("a@1", "a@2")


@pytest.mark.parametrize("records", ["directory"], indirect=True)
def test_a_damaged_record_is_written_again(home: Home) -> None:
    version = home.publish("a")
    path = home.root / "adapters" / "names" / "a" / "1.json"
    for broken in (b"", b"{", encode(version).replace(b'"rank": 4', b'"rank": 5'), b'{"format": 99}'):
        path.write_bytes(broken)
        assert home.recover() == Recovered(num_written=1)
        assert decode(path.read_bytes()) == version
    assert home.records.read().unreadable == ()
    path.write_bytes(b"{")
    assert home.records.read().unreadable == ("names/a/1.json",)


def test_an_interrupted_publication_is_finished_or_undone(home: Home) -> None:
    """The client got no answer, so both are correct, but the catalog and the records must agree."""
    home.publish("a")
    cut_off_publication(home, "a")
    assert home.names() == ["a@1"]
    assert home.recover() == Recovered(adopted=("a@2",))
    assert home.catalog.get("a").latest == 2
    cut_off_publication(home, "first")
    assert home.recover(lost={D[7]}).lost == ("first@1",)
    assert home.names() == ["a@1", "a@2"]
    assert home.publish("first").version == 2


def test_a_job_whose_publication_was_interrupted_publishes_once(home: Home) -> None:
    cut_off_publication(home, "a", job_id="job-1")
    assert home.recover(known={"job-1"}) == Recovered(num_dropped=1)
    assert home.names() == []
    assert home.publish("a", job_id="job-1").version == 1
    assert home.recover() == Recovered()


def test_an_interrupted_delete_is_finished(home: Home) -> None:
    for digest in D[:2]:
        home.publish("a", digest)
    transact(home.engine, lambda connection: drop_in(connection, "a", 2, False, Viewpoint()))  # and killed here
    assert home.recover() == Recovered(num_dropped=1)
    assert home.names() == ["a@1"]
    home.lose()
    home.recover()
    assert home.names() == ["a@1"]
    assert home.publish("a").version == 3


def test_a_delete_succeeds_if_the_database_fails_while_the_record_is_removed(home: Home) -> None:
    home.publish("a", D[1])
    num_begun = 0

    def begin(connection: sa.Connection) -> None:
        nonlocal num_begun
        num_begun += 1
        if num_begun == 2:
            raise OperationalError("BEGIN IMMEDIATE", {}, OSError("database is locked"))

    sa.event.listen(home.engine, "begin", begin)
    assert home.catalog.delete("a") == [D[1]], "its bytes are to go"
    sa.event.remove(home.engine, "begin", begin)
    assert home.catalog.list() == []
    assert home.recover(D).num_dropped == 1


@pytest.mark.parametrize("records", ["directory"], indirect=True)
def test_a_delete_takes_a_constant_number_of_statements(home: Home) -> None:
    """All other writers wait for it."""
    home.publish("other", D[2])
    statements: list[str] = []

    def watch(*given: object) -> None:
        statements.append(str(given[2]))

    counts = []
    for number in (4, 18):
        for digest in D[:number]:
            home.publish("a", digest)
        sa.event.listen(home.engine, "before_cursor_execute", watch)
        assert home.catalog.delete("a") == [digest for digest in D[:number] if digest != D[2]]
        sa.event.remove(home.engine, "before_cursor_execute", watch)
        counts.append(len(statements))
        statements.clear()
    assert counts[0] == counts[1]


@pytest.mark.parametrize("records", ["directory"], indirect=True)
def test_recovery_after_an_interrupted_delete_lists_a_name_once(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of versions doesn't matter."""
    for _ in range(9):
        home.publish("a", D[0])
    transact(home.engine, lambda connection: drop_in(connection, "a", None, False, Viewpoint()))  # and killed here
    looked: list[str] = []
    keys = home.records._blobs.keys

    def watched(prefix: str) -> list[str]:
        looked.append(prefix)
        return keys(prefix)

    monkeypatch.setattr(home.records._blobs, "keys", watched)
    assert home.recover() == Recovered(num_dropped=9)
    assert looked == ["names/", "projects/", "names/a/"], "to read them, and to remove them"
    assert home.publish("a").version == 10


def test_an_older_database_is_updated_from_the_records(home: Home) -> None:
    home.publish("a", D[0])
    home.engine.dispose()
    old = (home.root / FILE_NAME).read_bytes()
    home.open()
    home.publish("a", D[1])
    home.publish("a", D[2])
    home.catalog.delete_version("a", 2)
    home.publish("b", D[3])
    home.engine.dispose()
    (home.root / FILE_NAME).write_bytes(old)
    home.open()
    assert home.recover() == Recovered(adopted=("a@3", "b@1"))
    assert home.publish("a").version == 4


def test_compositions_of_lost_bytes_are_lost(home: Home) -> None:
    home.publish("a", D[0])
    home.publish("b", D[1])
    home.catalog.compose("good", parse("b*2"))
    home.catalog.compose("bad", parse("a+b"))
    home.lose()
    assert home.recover(lost={D[0]}) == Recovered(adopted=("b@1", "good@1"), lost=("a@1", "bad@1"))
    assert home.names() == ["b@1", "good@1"]


@pytest.mark.parametrize("records", ["directory"], indirect=True)
def test_killed_writers_leave_no_files(home: Home) -> None:
    home.publish("a")
    left = home.root / "adapters" / "names" / "a" / ".unfinished-x"
    left.write_bytes(b"{")
    home.recover()
    assert not left.exists()


def longest_wait(home: Home, asked: "Future[object]") -> float:
    """Return the longest wait of concurrent writers, in seconds."""
    longest = 0.0
    while not asked.done():
        began = time.monotonic()
        home.catalog.point("a", "prod", 1)
        longest = max(longest, time.monotonic() - began)
        time.sleep(0.01)
    return longest


@pytest.mark.cluster
@pytest.mark.parametrize("failure", ["cut", "full"])
def test_an_unreachable_bucket_blocks_no_other_writer(
    tmp_path: Path, proxied: "Bucket", proxy: Proxy, failure: Failure
) -> None:
    home = Home(tmp_path, Records(tmp_path / "adapters", proxied.under("adapters")))
    home.publish("a")
    works: list[Callable[[], object]] = [
        lambda: home.catalog.compose("mix", parse("a*0.7")),
        lambda: home.catalog.delete("old"),
    ]
    for _ in range(10):  # other processes use the machine for seconds at a time
        home.catalog.compose("old", parse("a*0.5"))
        proxy.fail(failure)
        with ThreadPoolExecutor(1) as pool:
            composing, deleting = (pool.submit(work) for work in works)
            waits = longest_wait(home, composing), longest_wait(home, deleting)
            assert isinstance(composing.exception(), BytesUnavailable)
            assert deleting.exception() is None
        assert home.names() == ["a@1"]
        proxy.fail("")
        if max(waits) < 0.5:
            break
    assert max(waits) < 0.5
    home.engine.dispose()


@pytest.mark.cluster
def test_records_can_be_removed_from_a_full_bucket(tmp_path: Path, proxied: "Bucket", proxy: Proxy) -> None:
    """Of a version that isn't its name's highest, and of one that wasn't committed: that writes nothing."""
    home = Home(tmp_path, Records(tmp_path / "adapters", proxied.under("adapters")))

    def kept() -> list[str]:
        return [stored.key for stored in proxied.under("adapters").listed()]

    home.publish("a")
    home.publish("a", D[1])
    proxy.fail("full")
    home.catalog.delete_version("a", 1)
    assert kept() == ["names/a/2.json"]
    proxy.fail("")
    uncommitted = replace(home.publish("b"), version=7)

    def publication() -> None:
        with recording(home.engine, home.records) as recorder:
            assert recorder is not None
            recorder.write(uncommitted)
            assert "names/b/7.json" in kept()
            proxy.fail("full")
            raise Killed

    with pytest.raises(Killed):
        publication()
    assert kept() == ["names/a/2.json", "names/b/1.json"]
    home.engine.dispose()
