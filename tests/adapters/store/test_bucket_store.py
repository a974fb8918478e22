"""Machines that share a bucket: all load what one publishes; running requests keep what another deletes."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from sqlalchemy.exc import OperationalError

from adapters.catalog.versions import NewVersion
from adapters.errors import BytesUnavailable, CorruptAdapter, InDoubt, Interrupted
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from adapters.recorded import own_files
from adapters.store.store import SIDECAR_NAME, AdapterStore
from tests.adapters.samples import SHAPE, sample_adapter
from tests.adapters.store.test_store import assert_equal, opened
from tests.kits.buckets import Failure, Proxy

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket
    from adapters.store.bucket_store import BucketAdapterStore


pytestmark = pytest.mark.cluster


class Machine(Protocol):
    """Open a process's store on the machine of that name; with `grace` below 0 tombstones expire at once."""

    def __call__(
        self, name: str, *, grace: float = -1.0, through: "Bucket | None" = None, cache_bytes: int | None = None
    ) -> "BucketAdapterStore": ...


ADAPTER = sample_adapter()
DIGEST = ADAPTER.weights.digest
WANTED = {DIGEST}.__contains__


def nobody(digest: str) -> bool:
    return False


@pytest.fixture
def machine(tmp_path: Path, bucket: "Bucket") -> Machine:
    from adapters.store.bucket_store import BucketAdapterStore

    def on(
        name: str, *, grace: float = -1.0, through: "Bucket | None" = None, cache_bytes: int | None = None
    ) -> BucketAdapterStore:
        place = (through or bucket).under("adapters")
        return BucketAdapterStore(tmp_path / name, place, cache_bytes, grace)

    return on


def keys(bucket: "Bucket", folder: str) -> list[str]:
    return [stored.key for stored in bucket.listed(f"adapters/{folder}/")]


def names(bucket: "Bucket") -> list[str]:
    return sorted(key.rsplit("/", 1)[1] for key in keys(bucket, "bytes"))


def publish(store: AdapterStore, in_use: Callable[[str], bool] = WANTED) -> int:
    with store.publishing(ADAPTER, in_use) as num_bytes:
        pass
    return num_bytes


def test_other_machines_load_a_published_adapter(machine: Machine, bucket: "Bucket") -> None:
    a, b = machine("a"), machine("b")
    text = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}'
    with a.publishing(ADAPTER, WANTED, {CONFIG_NAME: text}) as num_bytes:
        assert keys(bucket, "doubts") != []
    assert (keys(bucket, "doubts"), names(bucket)) == ([], [CONFIG_NAME, WEIGHTS_NAME, SIDECAR_NAME])
    assert_equal(b.load(DIGEST), ADAPTER.weights)
    assert opened(b, DIGEST) == opened(a, DIGEST)
    assert opened(b, DIGEST)[CONFIG_NAME] == text
    for store in (machine("c"), machine("d"), machine("e")):
        store.verify(DIGEST)
        store.verify_stored(DIGEST)
    assert_equal(machine("f").read(DIGEST, SHAPE).weights, ADAPTER.weights)
    assert machine("g").fits(DIGEST, SHAPE)
    assert b.digests() == a.digests() == [DIGEST]
    assert publish(machine("h")) == num_bytes == sum(stored.size for stored in bucket.listed("adapters/bytes/"))
    assert len(names(bucket)) == 3, "the same bytes are stored once"


def test_a_deleted_adapter_stays_for_running_requests_and_is_then_swept(
    machine: Machine, bucket: "Bucket"
) -> None:
    """B holds the digest, hasn't fetched it yet, and doesn't know of A's delete."""
    a, b, late = machine("a"), machine("b"), machine("late", grace=3600)
    publish(a)
    b.pin([DIGEST])
    a.discard(DIGEST, nobody)
    assert late.sweep(nobody) == []
    assert_equal(b.load(DIGEST), ADAPTER.weights)
    assert late.digests() == [], "to be published anew, it must be pushed anew"
    assert a.sweep(nobody) == [DIGEST]
    assert (keys(bucket, "bytes"), keys(bucket, "tombstones")) == ([], [])
    assert_equal(b.load(DIGEST), ADAPTER.weights)
    assert b.sweep(nobody) == []
    assert_equal(b.load(DIGEST), ADAPTER.weights)  # it is pinned
    b.unpin([DIGEST])
    for store in (a, b, late):
        with pytest.raises(CorruptAdapter, match=DIGEST[:12]):
            store.load(DIGEST)


@contextmanager
def each_request(deed: Callable[[int], None]) -> Iterator[None]:
    """Call `deed` before each request to a bucket in the block, with its number from 1; requests of `deed` don't
    count."""
    from adapters.storage.bucket import Bucket

    num_asked, is_busy = 0, False

    def before(method: Callable[..., object]) -> Callable[..., object]:
        def ask(bucket: Bucket, *arguments: object) -> object:
            nonlocal num_asked, is_busy
            if not is_busy:
                num_asked += 1
                is_busy = True
                try:
                    deed(num_asked)
                finally:
                    is_busy = False
            return method(bucket, *arguments)

        return ask

    with pytest.MonkeyPatch.context() as patched:
        for name in ("listed", "delete", "put", "put_file", "now"):
            patched.setattr(Bucket, name, before(getattr(Bucket, name)))
        yield


@pytest.mark.parametrize("number", [1, 2])
def test_a_copy_that_a_sweep_deletes_meanwhile_is_not_reported_as_stored(machine: Machine, number: int) -> None:
    """The sweep deletes the copy, and then the tombstone that existed until then."""
    a, b = machine("a"), machine("b")
    publish(a)
    a.discard(DIGEST, nobody)
    swept: list[str] = []

    def sweep(of: int) -> None:
        if of == number:
            swept.extend(a.sweep(nobody))

    with each_request(sweep):
        assert not b.is_whole(DIGEST)
    assert swept == [DIGEST]


def test_publishing_wins_over_a_sweep_at_every_line(machine: Machine, bucket: "Bucket") -> None:
    """A publisher runs in the middle of a sweep, before each of its requests in turn: the bytes stay."""

    def round_of(step: int) -> int:
        """Return the number of requests."""
        a, b = machine(f"a{step}"), machine(f"b{step}")
        publish(a)
        a.discard(DIGEST, nobody)
        wanted: set[str] = set()
        numbers = [0]

        def deed(number: int) -> None:
            numbers.append(number)
            if number == step:
                with b.publishing(ADAPTER, wanted.__contains__):
                    wanted.add(DIGEST)

        with each_request(deed):
            a.sweep(wanted.__contains__)
        if wanted:
            for _ in range(2):
                machine(f"c{step}").verify_stored(DIGEST)
                a.sweep(WANTED)
        a.discard(DIGEST, nobody)
        a.sweep(nobody)
        assert keys(bucket, "bytes") == [], f"garbage of step {step}"
        return max(numbers)

    num_steps = round_of(0)
    assert num_steps > 6
    for step in range(1, num_steps + 1):
        round_of(step)


def test_a_sweep_that_resumes_after_the_commit_deletes_nothing(machine: Machine, bucket: "Bucket") -> None:
    """The sweep asked whether the bytes are wanted just before a publisher found the tombstone and published them
    again."""
    a, b = machine("a"), machine("b")
    publish(a)
    a.discard(DIGEST, nobody)

    def asked_too_early(digest: str) -> bool:
        publish(b)
        return False

    assert a.sweep(asked_too_early) == [DIGEST]
    machine("c").verify_stored(DIGEST)
    a.sweep(WANTED)
    machine("d").verify_stored(DIGEST)
    assert len(names(bucket)) == 3


def test_a_publisher_whose_copy_was_deleted_uploads_another(machine: Machine, bucket: "Bucket") -> None:
    """Between its put and its commit the only other version is deleted and swept, at once."""
    a, b = machine("a"), machine("b")
    publish(a)
    with b.publishing(ADAPTER, WANTED):
        a.discard(DIGEST, nobody)
        assert a.sweep(nobody) == [DIGEST]
        assert names(bucket) == []
    machine("c").verify_stored(DIGEST)


def test_two_sweepers_do_no_harm(machine: Machine, bucket: "Bucket") -> None:
    stores = [machine(name) for name in "abcd"]
    publish(stores[0])
    stores[0].discard(DIGEST, nobody)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda store: store.sweep(nobody), stores))
    assert bucket.listed() == []


class Killed(BaseException):
    """Raised instead of a kill."""


def test_killed_at_any_request_leaves_garbage_at_most(machine: Machine, bucket: "Bucket") -> None:
    """A publication and a delete are cut off at each of their requests in turn: versions have their bytes, and
    other bytes are swept."""

    def is_killed(last: int) -> bool:
        wanted: set[str] = set()

        def deed(number: int) -> None:
            if number >= last:
                raise Killed

        was_killed = False
        with each_request(deed):
            store = machine(f"a{last}")
            try:
                with store.publishing(ADAPTER, wanted.__contains__):
                    wanted.add(DIGEST)
                store.doubt([DIGEST])
                wanted.clear()
                store.discard(DIGEST, wanted.__contains__)
            except Killed:
                was_killed = True
        b = machine(f"b{last}")
        if wanted:
            b.sweep(wanted.__contains__)
            b.verify_stored(DIGEST)
            b.discard(DIGEST, nobody)
        for _ in range(2):  # doubts become tombstones, which then expire
            b.sweep(nobody)
        assert bucket.listed() == [], f"garbage of a kill at request {last}"
        return was_killed

    num_requests = next(last for last in range(1, 60) if not is_killed(last))
    assert num_requests > 12


@pytest.mark.parametrize("lost", [CONFIG_NAME, WEIGHTS_NAME, SIDECAR_NAME])
def test_an_incomplete_upload_is_never_loaded(lost: str, machine: Machine, bucket: "Bucket") -> None:
    publish(machine("a"))
    (key,) = (key for key in keys(bucket, "bytes") if key.endswith(lost))
    bucket.delete([key])
    for ask in (machine("b").load, machine("c").verify_stored):
        with pytest.raises(CorruptAdapter):
            ask(DIGEST)
    assert not list((machine("b")._root).glob("[0-9a-f][0-9a-f]/*"))
    publish(d := machine("d"))  # the copy without a mark doesn't count
    if lost == SIDECAR_NAME:
        machine("e").verify(DIGEST)
    d.verify(DIGEST)


def test_damage_in_the_bucket_or_a_cache_is_found(machine: Machine, bucket: "Bucket", tmp_path: Path) -> None:
    publish(machine("a"))
    b = machine("b")
    b.load(DIGEST)
    place = tmp_path / "b" / DIGEST[:2] / DIGEST / WEIGHTS_NAME
    whole = place.read_bytes()
    for broken in (whole[:-4] + b"\0\0\0\1", whole[:100]):
        place.write_bytes(broken)
        b.verify(DIGEST)  # downloaded again
        assert place.read_bytes() == whole
    (key,) = (key for key in keys(bucket, "bytes") if key.endswith(WEIGHTS_NAME))
    bucket.put(key, whole[:-4] + b"\0\0\0\1")
    for ask in (machine("c").load, machine("d").verify_stored):
        with pytest.raises(CorruptAdapter):
            ask(DIGEST)


def test_a_changed_configuration_in_the_bucket_or_a_cache_is_found(
    machine: Machine, bucket: "Bucket", tmp_path: Path
) -> None:
    publish(machine("a"))
    b = machine("b")
    b.load(DIGEST)
    place = tmp_path / "b" / DIGEST[:2] / DIGEST / CONFIG_NAME
    whole = place.read_bytes()
    place.write_bytes(whole.replace(b"8", b"9"))
    b.verify(DIGEST)  # downloaded again
    assert place.read_bytes() == whole
    (key,) = (key for key in keys(bucket, "bytes") if key.endswith(CONFIG_NAME))
    bucket.put(key, whole.replace(b"8", b"9"))
    for ask in (machine("c").open, machine("d").verify_stored):
        with pytest.raises(CorruptAdapter):
            ask(DIGEST)


def test_a_damaged_cached_copy_is_downloaded_again(machine: Machine, tmp_path: Path) -> None:
    publish(machine("a"))
    b = machine("b")
    b.load(DIGEST)
    place = tmp_path / "b" / DIGEST[:2] / DIGEST / WEIGHTS_NAME
    whole = place.read_bytes()
    place.write_bytes(whole[:-4] + b"\0\0\0\1")
    config, modules = ADAPTER.config, ADAPTER.weights.target_modules
    version = NewVersion("a", DIGEST, config.rank, config.alpha, modules, parameters=1, bytes=1)
    with own_files(version, b)[WEIGHTS_NAME] as file:
        assert file.read() == whole


def fetched(proxy: Proxy) -> int:
    return proxy.count("GET", WEIGHTS_NAME)


def test_loading_only_reads(machine: Machine, patient: "Bucket", proxy: Proxy) -> None:
    """Engine replicas may have a key that allows no more."""
    publish(machine("a"))
    assert_equal(machine("b", through=patient).load(DIGEST), ADAPTER.weights)
    assert {method for method, _ in proxy.asked} == {"GET"}


def test_concurrent_readers_download_once(machine: Machine, patient: "Bucket", proxy: Proxy) -> None:
    """Threads of two processes on one machine."""
    publish(machine("a"))
    stores = [machine("b", through=patient) for _ in range(2)]
    with ThreadPoolExecutor(16) as pool:
        for weights in pool.map(lambda n: stores[n % 2].load(DIGEST), range(32)):
            assert_equal(weights, ADAPTER.weights)
    assert fetched(proxy) == 1
    stores[0].load(DIGEST)
    assert fetched(proxy) == 1


def published(store: AdapterStore, seeds: Iterable[int]) -> Iterator[tuple[str, int]]:
    for seed in seeds:
        adapter = sample_adapter(seed)
        with store.publishing(adapter, lambda _: True) as num_bytes:
            yield adapter.weights.digest, num_bytes


def test_the_cache_evicts_the_least_recently_used_and_keeps_pinned_bytes(
    machine: Machine, patient: "Bucket", proxy: Proxy, tmp_path: Path
) -> None:
    (first, size), *others = published(machine("a"), range(6))
    digests = [first, *(digest for digest, _ in others)]
    b = machine("b", through=patient, cache_bytes=3 * size + 100)

    def cached() -> set[str]:
        return {path.name for path in (tmp_path / "b").glob("[0-9a-f][0-9a-f]/*")}

    b.pin([digests[0]])
    for digest in digests[:3]:
        b.load(digest)
        time.sleep(0.01)
    assert (cached(), fetched(proxy)) == (set(digests[:3]), 3)
    b.load(digests[1])
    time.sleep(0.01)
    weights = b.load(digests[3])
    assert cached() == {digests[0], digests[1], digests[3]}
    b.unpin([digests[0]])
    for digest in digests[4:]:
        time.sleep(0.01)
        b.load(digest)
    assert cached() == {digests[3], *digests[4:]}
    assert fetched(proxy) == 6
    assert_equal(weights, sample_adapter(3).weights)  # loaded weights outlive their file
    time.sleep(0.01)
    assert_equal(b.load(digests[0]), sample_adapter(0).weights)
    assert fetched(proxy) == 7


def test_packed_files_are_not_uploaded_and_count_towards_the_cache(
    machine: Machine, bucket: "Bucket", tmp_path: Path
) -> None:
    """Loading a packed adapter counts as use of the published file, although nothing read that file."""
    (_, size), *_ = published(machine("a"), range(1))
    b = machine("b", cache_bytes=5 * size)
    b.packed.make = lambda digest, weights: [memoryview(bytes(size))]
    digests = [digest for digest, _ in published(b, range(1, 4))]
    assert set(names(bucket)) == {CONFIG_NAME, WEIGHTS_NAME, SIDECAR_NAME}

    def cached(pattern: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / "b").glob(pattern))

    assert cached("packed/*") == cached("[0-9a-f][0-9a-f]/*") == sorted(digests[1:])
    time.sleep(0.01)
    b.packed.open(digests[1]).close()
    time.sleep(0.01)
    (new, _), *_ = published(b, range(4, 5))
    assert cached("packed/*") == cached("[0-9a-f][0-9a-f]/*") == sorted((digests[1], new))


@pytest.mark.parametrize("failure", ["500", "stall", "cut", "half"])
def test_failing_store_gives_503_in_time_and_leaves_no_partial_bytes(
    failure: Failure,
    machine: Machine,
    bucket: "Bucket",
    proxied: "Bucket",
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapters.storage.bucket.OUTAGE_SECONDS", 0.0)  # each operation tries
    publish(machine("a"), WANTED)
    b = machine("b", through=proxied)
    proxy.fail(failure)
    began = time.monotonic()
    with pytest.raises(BytesUnavailable):
        b.load(DIGEST)
    other = sample_adapter(7)
    with pytest.raises(BytesUnavailable), b.publishing(other, nobody):
        pytest.fail("it isn't stored: no version may name it")
    assert time.monotonic() - began < 8
    assert [path.name for path in (tmp_path / "b").glob("[0-9a-f][0-9a-f]/*")] == []
    assert list((tmp_path / "b").glob(".tmp-*")) == []
    assert other.weights.digest not in machine("c").digests()
    proxy.fail(failure, 1)
    assert_equal(b.load(DIGEST), ADAPTER.weights)


def test_an_upload_waits_for_a_silent_store_once(
    machine: Machine, proxied: "Bucket", proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows the failure, to remove what was uploaded, doesn't ask a store that doesn't answer."""
    monkeypatch.setattr("adapters.storage.bucket.OUTAGE_SECONDS", 600.0)
    store, asked = machine("a", through=proxied), list[int]()

    def publish_and_fail() -> None:
        with store.publishing(ADAPTER, nobody):
            proxy.fail("stall")
            try:
                proxied.put("record", b"")  # as the catalog does at a commit
            finally:
                asked.append(proxy.asked.total())

    with pytest.raises(BytesUnavailable):
        publish_and_fail()
    assert [proxy.asked.total()] == asked


@pytest.mark.parametrize("error", [Interrupted(), OperationalError("SELECT", {}, OSError("it went away"))])
def test_an_unconfirmed_commit_is_reported_as_in_doubt(machine: Machine, error: Exception) -> None:
    """It is unknown whether the bytes are wanted: a sweep asks again."""

    def fails(_: str) -> bool:
        raise error

    store = machine("a")
    store.pin([DIGEST])  # as a publisher does
    with pytest.raises(InDoubt), store.publishing(ADAPTER, fails):
        raise InDoubt
    with suppress(Interrupted, OperationalError):
        store.unpin([DIGEST])
    assert store.is_whole(DIGEST)
    store.doubt([DIGEST])
    store.sweep(nobody)
    store.sweep(nobody)
    assert store.digests() == []
