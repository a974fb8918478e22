"""The store: loaded bits equal those put, nothing half-written is ever visible, and pins outlive deletes."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.errors import CorruptAdapter
from adapters.lora import LoraWeights
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME, read
from adapters.store.store import AdapterStore
from tests.adapters.oracle import assert_same, live, loaded
from tests.adapters.samples import SHAPE, sample_adapter
from tests.adapters.store.conftest import ADAPTER, DIGEST, OpenStore
from tests.kits.small_disk import refuse_folders


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "adapters").glob(".tmp-*"))


def assert_equal(weights: LoraWeights, others: LoraWeights) -> None:
    assert weights.modules.keys() == others.modules.keys()
    for key, module in weights.modules.items():
        assert torch.equal(module.a, others.modules[key].a)
        assert torch.equal(module.b, others.modules[key].b)
        assert module.scaling == others.modules[key].scaling


def test_a_stored_adapter_can_be_loaded(store: AdapterStore, place: Path, tmp_path: Path) -> None:
    num_bytes = store.put(ADAPTER)
    assert num_bytes == sum(path.stat().st_size for path in place.iterdir())
    assert_equal(store.load(DIGEST), ADAPTER.weights)
    store.verify(DIGEST)
    assert sorted(path.name for path in place.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME, "smolora.json"]
    assert leftovers(tmp_path) == []


def test_mixed_dtypes_and_odd_scalings_are_kept(store: AdapterStore) -> None:
    adapter = sample_adapter(rank=3)
    modules = {
        key: type(m)(m.a.half(), m.b.to(torch.bfloat16), m.scaling) for key, m in adapter.weights.modules.items()
    }
    mixed = type(adapter)(adapter.config, LoraWeights(modules))
    store.put(mixed)
    loaded_weights = store.load(mixed.weights.digest)
    assert_equal(loaded_weights, mixed.weights)
    assert {(m.a.dtype, m.b.dtype) for m in loaded_weights.modules.values()} == {(torch.float16, torch.bfloat16)}


def test_putting_again_changes_nothing(store: AdapterStore, place: Path) -> None:
    first = store.put(ADAPTER)
    before = {path: path.stat().st_ino for path in place.iterdir()}
    assert store.put(sample_adapter(base_model="another"), {CONFIG_NAME: b"{}"}) == first
    assert {path: path.stat().st_ino for path in place.iterdir()} == before


def opened(store: AdapterStore, digest: str) -> dict[str, bytes]:
    """Return the files' contents, by name."""
    contents = {}
    for name, file in store.open(digest).items():
        with file:
            contents[name] = file.read()
    return contents


def test_peft_reads_stored_adapters(store: AdapterStore, tmp_path: Path) -> None:
    store.put(ADAPTER)
    contents = opened(store, DIGEST)
    assert list(contents) == [CONFIG_NAME, WEIGHTS_NAME]
    (tmp_path / "copy").mkdir()
    for name, content in contents.items():
        (tmp_path / "copy" / name).write_bytes(content)
    assert_same(ADAPTER.weights, live(loaded(tmp_path / "copy")))
    other = AdapterStore(tmp_path / "other")
    other.put(ADAPTER)
    assert opened(other, DIGEST) == contents


def test_open_files_outlive_a_discard(store: AdapterStore) -> None:
    store.put(ADAPTER)
    contents, files = opened(store, DIGEST), store.open(DIGEST)
    store.discard(DIGEST)
    for name, file in files.items():
        with file:
            assert file.read() == contents[name]


def test_an_upload_keeps_its_config(store: AdapterStore, place: Path) -> None:
    text = (
        b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "revision": "x"}'
    )
    store.put(ADAPTER, {CONFIG_NAME: text, WEIGHTS_NAME: b"is written anew"})
    assert (place / CONFIG_NAME).read_bytes() == text
    assert read(text, place / WEIGHTS_NAME, SHAPE).weights.digest == DIGEST
    store.verify(DIGEST)


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_missing_or_damaged_files_are_reported(store: AdapterStore, place: Path) -> None:
    for call in (store.load, store.verify, store.open):
        with pytest.raises(CorruptAdapter, match=DIGEST[:12]):
            call(DIGEST)
    store.put(ADAPTER)
    weights = place / WEIGHTS_NAME
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-4] + b"\0\0\0\1")
    store.load(DIGEST)  # a quick load, which can't detect it
    with pytest.raises(CorruptAdapter, match="no longer matches its digest"):
        store.verify(DIGEST)
    for broken in (b"", whole[:100], whole[:-1], b"\xff" * 100):
        weights.write_bytes(broken)
        with pytest.raises(CorruptAdapter, match="missing or unreadable"):
            store.load(DIGEST)
    weights.write_bytes(whole)
    sidecar = place / "smolora.json"
    document = json.loads(sidecar.read_bytes())
    for changed in (
        b"",
        b"[]",
        b"{}",
        json.dumps(document | {"format": 99}).encode(),
        b'{"format": 1, "modules": [[1]]}',
    ):
        sidecar.write_bytes(changed)
        with pytest.raises(CorruptAdapter, match="missing or unreadable"):
            store.load(DIGEST)


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
@pytest.mark.parametrize("original", [None, {CONFIG_NAME: b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'}])
def test_a_changed_configuration_is_found(
    original: dict[str, bytes] | None, store: AdapterStore, place: Path
) -> None:
    """The configuration isn't in any digest, but downloads contain it."""
    store.put(ADAPTER, original)
    store.verify(DIGEST)
    config = place / CONFIG_NAME
    whole = config.read_bytes()
    changed = whole.replace(b'"lora_alpha": 8', b'"lora_alpha": 9')
    assert changed != whole
    config.write_bytes(changed)
    with pytest.raises(CorruptAdapter, match=r"its adapter_config\.json was changed"):
        store.verify(DIGEST)


@pytest.mark.parametrize("lost", [CONFIG_NAME, WEIGHTS_NAME, "smolora.json"])
def test_putting_repairs_a_missing_file(lost: str, store: AdapterStore, place: Path, tmp_path: Path) -> None:
    store.put(ADAPTER)
    (place / lost).unlink()
    store.put(ADAPTER)
    store.verify(DIGEST)
    assert all(opened(store, DIGEST).values())
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
@pytest.mark.parametrize(
    ("file", "at"), [(WEIGHTS_NAME, -3), (WEIGHTS_NAME, 9), ("smolora.json", 3)], ids=["tensor", "head", "facts"]
)
def test_putting_repairs_changed_bytes(
    file: str, at: int, store: AdapterStore, place: Path, tmp_path: Path
) -> None:
    """Damage by the disk, or by its backup, that changes no size."""
    store.put(ADAPTER)
    damaged = bytearray((place / file).read_bytes())
    damaged[at] ^= 1
    (place / file).write_bytes(damaged)
    with pytest.raises(CorruptAdapter):
        store.verify(DIGEST)
    store.put(ADAPTER)
    store.verify(DIGEST)
    assert_equal(store.load(DIGEST), ADAPTER.weights)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("digest", ["", "..", "../../etc", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_a_malformed_digest_is_refused(digest: str, store: AdapterStore) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        store.load(digest)


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_discard_removes_unpinned_bytes_at_once(store: AdapterStore, place: Path, tmp_path: Path) -> None:
    store.put(ADAPTER)
    weights = store.load(DIGEST)
    store.discard(DIGEST)
    assert not place.exists()
    assert leftovers(tmp_path) == []
    assert_equal(weights, ADAPTER.weights)  # loaded weights outlive it
    with pytest.raises(CorruptAdapter):
        store.load(DIGEST)
    store.discard(DIGEST)


def test_a_pinned_adapter_outlives_its_discard_until_the_last_unpin(store: AdapterStore, place: Path) -> None:
    store.put(ADAPTER)
    store.pin([DIGEST, DIGEST])
    store.pin([DIGEST])
    store.discard(DIGEST)
    for _ in range(2):
        store.unpin([DIGEST])
        assert_equal(store.load(DIGEST), ADAPTER.weights)
    store.unpin([DIGEST])
    assert not place.exists()


def test_unpinning_without_a_discard_keeps_bytes(store: AdapterStore, place: Path) -> None:
    store.put(ADAPTER)
    store.pin([DIGEST])
    store.unpin([DIGEST])
    assert place.exists()


def test_putting_revives_discarded_pinned_bytes(store: AdapterStore, place: Path) -> None:
    store.pin([DIGEST])  # before it exists, as a publisher does
    store.put(ADAPTER)
    store.discard(DIGEST)
    store.put(ADAPTER)
    store.unpin([DIGEST])
    assert place.exists()


def test_bytes_that_are_wanted_again_at_the_last_unpin_stay(store: AdapterStore, place: Path) -> None:
    wanted = {DIGEST}
    store.put(ADAPTER)
    store.discard(DIGEST, wanted.__contains__)
    assert place.exists()
    wanted.clear()
    store.pin([DIGEST])
    store.discard(DIGEST, wanted.__contains__)
    wanted.add(DIGEST)  # another process published the same bytes
    store.unpin([DIGEST])
    assert place.exists()


def test_concurrent_put_and_discard_end_whole_or_absent(
    store: AdapterStore, open_store: OpenStore, place: Path, tmp_path: Path
) -> None:
    """The catalog decides: once the bytes are wanted and put again, they stay."""
    other_process = open_store()
    for _ in range(40):
        wanted: set[str] = set()

        def publish(wanted: set[str] = wanted) -> None:
            other_process.put(ADAPTER)
            wanted.add(DIGEST)
            other_process.put(ADAPTER)

        with ThreadPoolExecutor(4) as pool:
            jobs: list[Future[Any]] = [pool.submit(publish), pool.submit(other_process.put, ADAPTER)]
            jobs += [pool.submit(store.discard, DIGEST, wanted.__contains__) for _ in range(2)]
        for job in jobs:
            job.result()
        store.verify(DIGEST)
        store.discard(DIGEST)
    assert leftovers(tmp_path) == []


def test_many_threads_put_one_adapter(store: AdapterStore, tmp_path: Path) -> None:
    barrier = threading.Barrier(6)

    def put(_: int) -> int:
        barrier.wait()
        return store.put(sample_adapter(seed=5))

    with ThreadPoolExecutor(6) as pool:
        sizes = set(pool.map(put, range(6)))
    assert len(sizes) == 1
    store.verify(sample_adapter(seed=5).weights.digest)
    assert leftovers(tmp_path) == []


def test_a_full_disk_leaves_nothing(store: AdapterStore, place: Path, tmp_path: Path) -> None:
    """A full disk is simulated by the file size limit of a process of its own."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from adapters.store.store import AdapterStore\n"
        "from tests.adapters.samples import sample_adapter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try: AdapterStore(Path(sys.argv[1])).put(sample_adapter())\n"
        "except OSError: sys.exit(7)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "adapters")], check=False)
    assert run.returncode == 7
    assert not place.exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_discard_works_on_a_full_disk(
    store: AdapterStore, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(ADAPTER)
    with monkeypatch.context() as full:
        refuse_folders(full)
        store.discard(DIGEST)
    assert not place.exists()
    assert leftovers(tmp_path) == []
    store.put(ADAPTER)
    store.verify(DIGEST)


def test_a_sweep_removes_abandoned_temporary_directories(store: AdapterStore, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    for name in (".tmp-left", ".tmp-locked"):
        (root / name).mkdir()
        (root / name / "file").write_bytes(b"x")
    handle = os.open(root / ".tmp-locked", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # as a writer does
    assert store.leftovers() == [".tmp-left"]
    assert AdapterStore(root).sweep(lambda digest: True) == []
    assert [path.name for path in leftovers(tmp_path)] == [".tmp-locked"]
    os.close(handle)
    store.sweep(lambda digest: True)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("open_store", ["directory"], indirect=True)
def test_a_sweep_removes_unpublished_bytes_that_no_process_holds(store: AdapterStore, tmp_path: Path) -> None:
    adapters = [sample_adapter(seed) for seed in range(3)]
    published, orphan, fresh = (adapter.weights.digest for adapter in adapters)
    for adapter in adapters:
        store.put(adapter)
    assert store.digests() == sorted([published, orphan, fresh])
    with AdapterStore(tmp_path / "adapters").publishing(adapters[2], {published}.__contains__):
        assert store.is_being_published(fresh)
        assert store.sweep(lambda digest: digest in (published, fresh)) == [orphan]
        store.sweep({published}.__contains__)
        store.discard(fresh)
        store.verify(fresh)
    assert not store.is_being_published(fresh)
    store.verify(published)
    assert store.sweep({published}.__contains__) == [fresh]
    assert store.digests() == [published]


def test_a_failed_publication_discards_unwanted_bytes(store: AdapterStore) -> None:
    for wanted in ([DIGEST], []):
        with pytest.raises(ValueError, match="no commit"), store.publishing(ADAPTER, wanted.__contains__):
            raise ValueError("no commit")
        assert store.digests() == wanted
        assert not store.is_being_published(DIGEST)


def test_publishing_stores_bytes_again_if_they_were_removed(open_store: OpenStore) -> None:
    """Another process discards the bytes repeatedly, and the block always finds them."""
    mine, other = open_store(), open_store()
    stop = threading.Event()

    def discard() -> None:
        while not stop.is_set():
            other.discard(DIGEST)

    with ThreadPoolExecutor(1) as pool:
        discarding = pool.submit(discard)
        for _ in range(20):
            with mine.publishing(ADAPTER, {DIGEST}.__contains__) as num_bytes:
                assert num_bytes > 0
                for _ in range(3):
                    mine.verify(DIGEST)
        stop.set()
        discarding.result()


NURSERY = """
import os, signal, sys, time
from pathlib import Path
import torch
from adapters.store.store import AdapterStore
from tests.adapters.samples import sample_adapter
torch.set_num_threads(1)
root = Path(sys.argv[1])
adapters = [sample_adapter(seed, rank=64) for seed in range(4)]
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        store = AdapterStore(root)
        while True:
            for adapter in adapters:
                store.put(adapter)
                store.discard(adapter.weights.digest)
                store.put(adapter)
                store.discard(adapter.weights.digest)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""
"""A script that forks a process that puts and discards without end, and kills it after the seconds that it
reads."""


def test_a_kill_anywhere_leaves_only_whole_adapters(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    adapters = {
        adapter.weights.digest: adapter for adapter in (sample_adapter(seed, rank=64) for seed in range(4))
    }
    seen = halves = 0
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    with nursery:
        assert nursery.stdout.readline() == "ready\n"
        for attempt in range(60):
            print(0.01 + 0.0011 * attempt, file=nursery.stdin, flush=True)
            assert nursery.stdout.readline() == "killed\n"
            store = AdapterStore(root)
            for path in root.glob("[0-9a-f][0-9a-f]/*"):
                assert_equal(store.load(path.name), adapters[path.name].weights)
                store.verify(path.name)
                opened(store, path.name)
                seen += 1
            for path in leftovers(tmp_path):
                shutil.rmtree(path)
                halves += 1
        nursery.stdin.close()
    assert seen > 0, "every kill came too early to see anything"
    assert halves > 0, "every kill came between two writes"
    for digest, adapter in adapters.items():  # the store continues from there
        store.put(adapter)
        store.verify(digest)
