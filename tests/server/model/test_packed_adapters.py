"""Packed adapters: the pools get the same bytes either way, and no damaged file is ever served."""

import errno
import hashlib
import io
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path

import pytest
import torch
from typing_extensions import Buffer

from adapters.errors import CorruptAdapter, Unavailable
from adapters.lora import BaseShape, LoraConfig, LoraModule, LoraWeights
from adapters.peft.files import PeftAdapter
from adapters.storage.durable import UNFINISHED
from adapters.store import packed as packed_files
from adapters.store.packed import PackedFiles, Pieces
from adapters.store.store import AdapterStore
from server.model.native.model import ROW_FORMAT
from server.model.packed_adapters import FORMAT, PackedAdapters, is_damaged
from server.model.rank_rows import PackedFile, Placement, RankRows, RowFormat, RowLayout, Run, Stored
from tests.kits.engines import random_adapter

CPU = torch.device("cpu")
TINY = BaseShape(
    3,
    {
        "q_proj": (96, 64),
        "k_proj": (32, 64),
        "v_proj": (32, 64),
        "o_proj": (64, 96),
        "gate_proj": (160, 64),
        "up_proj": (160, 64),
        "down_proj": (64, 160),
    },
)
SMOLLM = BaseShape(
    30,
    {
        "q_proj": (576, 576),
        "k_proj": (192, 576),
        "v_proj": (192, 576),
        "o_proj": (576, 576),
        "gate_proj": (1536, 576),
        "up_proj": (1536, 576),
        "down_proj": (576, 1536),
    },
)
ADAPTERS: dict[str, Callable[[BaseShape], LoraWeights]] = {
    "all modules": lambda shape: random_adapter(shape, 0, rank=16),
    "odd ranks by layer, in bf16": lambda shape: random_adapter(
        shape, 1, rank=lambda key: 1 + (7 * key.layer + len(key.module)) % 11, dtype=torch.bfloat16
    ),
    "some modules of some layers, in fp16": lambda shape: random_adapter(
        shape, 2, rank=3, modules=["k_proj", "down_proj"], layers=[0, 2], dtype=torch.float16
    ),
    "a rank of one": lambda shape: random_adapter(shape, 3, rank=1, modules=["up_proj"]),
    "odd scalings, huge and tiny numbers": lambda shape: LoraWeights(
        {
            key: LoraModule(module.a * 1e38 ** (key.layer % 3 - 1), module.b * 1e-38, 1 / 3)
            for key, module in random_adapter(shape, 4, rank=8).modules.items()
        }
    ),
}


def published(weights: LoraWeights) -> PeftAdapter:
    """Publish the adapter with the minimal configuration that the store accepts."""
    ranks = {key.path: module.rank for key, module in weights.modules.items()}
    alphas = {key.path: module.rank * module.scaling for key, module in weights.modules.items()}
    config = LoraConfig(8, 8.0, tuple(ranks), rank_pattern=ranks, alpha_pattern=alphas)
    exact = {key: LoraModule(m.a, m.b, config.scaling_of(key)) for key, m in weights.modules.items()}
    return PeftAdapter(config, LoraWeights(exact))


class CountingLayout(RowLayout):
    """A layout that counts how often it packed."""

    num_packed = 0

    def pack(self, weights: LoraWeights) -> torch.Tensor:
        self.num_packed += 1
        return super().pack(weights)


def pool_of(shape: BaseShape, stored: Stored, max_rank: int = 40) -> tuple[RankRows, Placement]:
    """Return pools in which the adapter follows another's rows; the rest is zero."""
    rows = RankRows(shape, max_rank=max_rank, row_format=ROW_FORMAT, device=CPU)
    for tensor in (*rows.a.values(), *rows.b.values()):
        tensor.zero_()
    placement = Placement({group: Run(need, 6, 12) for group, need in rows.needs(stored).items()})
    rows.place(stored, placement)
    return rows, placement


def assert_same_pools(shape: BaseShape, stored: Stored, expected_of: Stored, max_rank: int = 40) -> None:
    found, placement = pool_of(shape, stored, max_rank)
    expected, expected_placement = pool_of(shape, expected_of, max_rank)
    assert placement == expected_placement
    for group in expected.a:
        assert torch.equal(found.a[group].view(torch.uint8), expected.a[group].view(torch.uint8))
        assert torch.equal(found.b[group].view(torch.uint8), expected.b[group].view(torch.uint8))
        assert group not in placement or expected.a[group].any()


def in_memory(layout: RowLayout, weights: LoraWeights) -> PackedFile:
    """Place the adapter as if from a packed file, whether or not one is kept."""
    content = io.BytesIO(layout.pack(weights).numpy().data)

    def read(buffers: Sequence[memoryview]) -> None:
        assert [content.readinto(buffer) for buffer in buffers] == [buffer.nbytes for buffer in buffers]

    return PackedFile(layout.needs_of(weights), read)


def settle() -> None:
    """Wait for background writes."""
    for thread in threading.enumerate():
        if thread.name == "adapter-packer":
            thread.join()


def packed_file(store_root: Path, digest: str) -> Path:
    return store_root / "packed" / digest


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("shape", [TINY, SMOLLM], ids=["tiny", "smollm"])
def test_the_pools_get_the_same_bytes_whichever_way(shape: BaseShape, name: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    adapter = published(ADAPTERS[name](shape))
    digest = adapter.weights.digest
    store.put(adapter)  # before the first packing
    packed = PackedAdapters(store, RowLayout(shape, ROW_FORMAT))
    assert isinstance(packed.load(digest), LoraWeights)
    settle()
    file = packed_file(tmp_path, digest)
    file_before = file.stat()
    loaded = packed.load(digest)
    assert isinstance(loaded, PackedFile)
    assert loaded.needs == RowLayout(shape, ROW_FORMAT).needs_of(adapter.weights)
    assert file_before.st_size == 4096 + RowLayout(shape, ROW_FORMAT).num_bytes(loaded.needs)
    assert_same_pools(shape, loaded, store.load(digest))
    settle()
    assert file.stat().st_ino == file_before.st_ino, "what is there is not written again"


def test_stored_adapters_are_packed_at_once(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    adapter = published(ADAPTERS["all modules"](TINY))
    digest = adapter.weights.digest
    num_bytes = store.put(adapter)
    place = tmp_path / digest[:2] / digest
    assert num_bytes == sum(path.stat().st_size for path in place.iterdir()), "a cache isn't counted"
    file = packed_file(tmp_path, digest)
    os.utime(file, (1, 1))
    loaded = PackedAdapters(AdapterStore(tmp_path), RowLayout(TINY, ROW_FORMAT)).load(digest)
    assert file.stat().st_mtime > 1, "that it was used is noted"
    (place / "adapter_model.safetensors").unlink()  # it isn't read
    assert_same_pools(TINY, loaded, adapter.weights)


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "torn in the header": lambda content: content[:100],
    "torn": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "a byte long": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "no object": lambda content: b"[1]".ljust(4096) + content[4096:],
    "another layout": lambda content: content.replace(b'"layout":"', b'"layout":"0'),
    "another adapter": lambda content: content.replace(b'"digest":"', b'"digest":"0'),
    "other ranks": lambda content: content.replace(b'"q_proj":16', b'"q_proj":18'),
    "ranks that are none": lambda content: content.replace(b'"q_proj":16', b'"q_proj":""'),
    "no ranks": lambda content: content.replace(b'"ranks"', b'"wanks"'),
    "of a release that kept no sum": lambda content: content.replace(b'"sum"', b'"was"'),
}


@pytest.mark.parametrize("how", SPOILED)
def test_damaged_packed_file_is_written_again(how: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    adapter = published(ADAPTERS["all modules"](TINY))
    store.put(adapter)
    file = packed_file(tmp_path, adapter.weights.digest)
    sound = file.read_bytes()
    spoiled = SPOILED[how](sound)
    assert spoiled != sound
    file.write_bytes(spoiled)
    assert_same_pools(TINY, packed.load(adapter.weights.digest), adapter.weights)
    settle()
    assert file.read_bytes() == sound


@pytest.mark.parametrize("at", [4096, 30_000, -1])
def test_changed_bytes_are_found_by_the_doctor(at: int, tmp_path: Path) -> None:
    """A load doesn't check the bytes; what a load would ignore isn't a finding."""
    store = AdapterStore(tmp_path)
    PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    adapter = published(ADAPTERS["all modules"](TINY))
    store.put(adapter)
    file = packed_file(tmp_path, adapter.weights.digest)
    (file.parent / f"{UNFINISHED}new").write_bytes(b"half")

    def looked_at() -> list[tuple[str, bool]]:
        return [(digest, is_damaged(content)) for digest, content in store.packed.contents()]

    before = file.stat().st_mtime
    assert looked_at() == [(adapter.weights.digest, False)]
    assert file.stat().st_mtime == before
    sound = file.read_bytes()
    changed = bytearray(sound)
    changed[at] ^= 0x80
    file.write_bytes(changed)
    assert looked_at() == [(adapter.weights.digest, True)]
    for spoil in ("empty", "zeros", "no object", "of a release that kept no sum"):
        file.write_bytes(SPOILED[spoil](sound))
        assert not any(damaged for _, damaged in looked_at())


@pytest.mark.parametrize(
    "other",
    [
        RowLayout(BaseShape(2, TINY.features), ROW_FORMAT),
        RowLayout(BaseShape(3, dict(TINY.features) | {"o_proj": (96, 64), "v_proj": (96, 64)}), ROW_FORMAT),
        RowLayout(TINY, RowFormat(torch.bfloat16, torch.bfloat16, 16)),
        RowLayout(TINY, RowFormat(torch.float16, torch.float16, 32)),
    ],
    ids=["layers", "features", "tile", "dtype"],
)
def test_a_file_of_another_layout_is_not_read(other: RowLayout, tmp_path: Path) -> None:
    """Even if its sizes happen to be the same."""
    store = AdapterStore(tmp_path)
    weights = random_adapter(TINY, 0, rank=16, modules=["q_proj", "k_proj"], layers=[0, 1])
    adapter = published(weights)
    PackedAdapters(store, other)
    store.put(adapter)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    assert_same_pools(TINY, packed.load(adapter.weights.digest), adapter.weights)
    settle()


def test_the_layout_grows_a_number_when_it_changes() -> None:
    """Files of the old version would be taken for the new one's: if this fails, raise FORMAT, then these
    numbers."""

    def counted(*shape: int) -> torch.Tensor:
        return (torch.arange(math.prod(shape)) % 251 / 8).view(shape)

    modules = {
        key: LoraModule(counted(*module.a.shape), counted(*module.b.shape), 0.5)
        for key, module in ADAPTERS["odd ranks by layer, in bf16"](TINY).modules.items()
    }
    content = RowLayout(TINY, ROW_FORMAT).pack(LoraWeights(modules))
    found = FORMAT, hashlib.sha256(content.numpy().data).hexdigest()
    assert found == (1, "44201e41f6a212359655b25913d410639952fa23a0d45fe72f1840dc91f19045")


@pytest.mark.parametrize("why", ["no room", "no folder"])
def test_full_disk_fails_no_load(why: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT), min_free_bytes=1 << 60 if why == "no room" else 0)
    if why == "no folder":
        (tmp_path / "packed").touch()
    adapter = published(ADAPTERS["all modules"](TINY))
    store.put(adapter)
    for _ in range(2):
        assert_same_pools(TINY, packed.load(adapter.weights.digest), adapter.weights)
        settle()
    assert not packed_file(tmp_path, adapter.weights.digest).exists()


def test_an_upload_is_not_multiplied_by_the_layers(tmp_path: Path) -> None:
    """One layer's rank counts for all layers: a file that would be nearly all zeros is neither made nor kept, and
    the same bits are placed anyway."""
    deep = BaseShape(30, TINY.features)
    store, layout = AdapterStore(tmp_path), CountingLayout(deep, ROW_FORMAT)
    packed = PackedAdapters(store, layout)
    adapter = published(random_adapter(deep, 0, rank=300, modules=["q_proj"], layers=[7], dtype=torch.bfloat16))
    digest, published_bytes = adapter.weights.digest, 2 * adapter.weights.num_parameters
    assert layout.num_bytes(layout.needs_of(adapter.weights)) == 30 * published_bytes
    store.put(adapter)
    for _ in range(2):
        stored = packed.load(digest)
        settle()
        assert isinstance(stored, LoraWeights)
    assert layout.num_packed == 0
    assert not packed_file(tmp_path, digest).exists()
    assert_same_pools(deep, stored, in_memory(layout, adapter.weights), max_rank=200)


@pytest.mark.parametrize(
    ("layers", "rank", "is_packed"), [(8, 300, True), (7, 300, False), (1, 100, True)], ids=["4x", "more", "small"]
)
def test_how_much_larger_a_packed_form_may_be(layers: int, rank: int, is_packed: bool, tmp_path: Path) -> None:
    """Up to four times the published size, and a megabyte in any case."""
    deep = BaseShape(30, TINY.features)
    store = AdapterStore(tmp_path)
    PackedAdapters(store, RowLayout(deep, ROW_FORMAT))
    few = random_adapter(deep, 0, rank=rank, modules=["q_proj"], layers=range(layers), dtype=torch.bfloat16)
    store.put(published(few))
    assert packed_file(tmp_path, published(few).weights.digest).exists() == is_packed


def test_adapters_larger_than_any_pool_are_not_packed(tmp_path: Path) -> None:
    store, layout = AdapterStore(tmp_path), CountingLayout(TINY, ROW_FORMAT)
    adapters = [published(random_adapter(TINY, 0, rank=rank)) for rank in (8, 10)]
    fits, too_large = (adapter.weights for adapter in adapters)
    packed = PackedAdapters(store, layout, max_bytes=layout.num_bytes(layout.needs_of(fits)))
    for adapter in adapters:
        store.put(adapter)
        packed.load(adapter.weights.digest)
        settle()
    assert layout.num_packed == 1
    assert packed_file(tmp_path, fits.digest).exists()
    assert_same_pools(TINY, packed.load(too_large.digest), too_large)


def test_nothing_is_packed_in_vain_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a put, nor by each load of an unpacked adapter in a thread of its own."""
    store, layout = AdapterStore(tmp_path), CountingLayout(TINY, ROW_FORMAT)
    adapter = published(ADAPTERS["all modules"](TINY))
    packed = PackedAdapters(store, layout, min_free_bytes=1 << 60)
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    store.put(adapter)
    packed.load(adapter.weights.digest)
    assert (layout.num_packed, started) == (0, [])


def test_packed_file_is_removed_with_its_adapter(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    adapter = published(ADAPTERS["all modules"](TINY))
    digest = adapter.weights.digest
    store.put(adapter)
    loaded = packed.load(digest)
    store.pin([digest])
    store.discard(digest)
    assert packed_file(tmp_path, digest).exists()
    store.unpin([digest])
    assert not packed_file(tmp_path, digest).exists()
    with pytest.raises(Unavailable):
        pool_of(TINY, loaded)
    with pytest.raises(CorruptAdapter):
        packed.load(digest)
    store.packed.keep(digest, [memoryview(b"of one that was slow")])
    assert not packed_file(tmp_path, digest).exists()


def end_early(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(8192)


def replace_by_another(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"layout":"', b'"layout":"0', 1))


@pytest.mark.parametrize("spoil", [Path.unlink, end_early, replace_by_another])
def test_a_file_that_cannot_be_read_any_more_fails_one_placing(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    """Mapping it would kill the process. The next load uses the published file."""
    store = AdapterStore(tmp_path)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    adapter = published(ADAPTERS["all modules"](TINY))
    store.put(adapter)
    loaded = packed.load(adapter.weights.digest)
    spoil(packed_file(tmp_path, adapter.weights.digest))
    with pytest.raises(Unavailable, match="can't be read from the disk now"):
        pool_of(TINY, loaded)
    assert not packed_file(tmp_path, adapter.weights.digest).exists()
    assert_same_pools(TINY, packed.load(adapter.weights.digest), adapter.weights)
    settle()


def test_an_io_error_fails_one_placing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    adapter = published(ADAPTERS["all modules"](TINY))
    store.put(adapter)
    loaded = packed.load(adapter.weights.digest)

    class Failing(FileIO):
        def readinto(self, buffer: Buffer, /) -> int:
            raise OSError(errno.EIO, "a secret path")

    monkeypatch.setattr(packed_files, "FileIO", Failing)
    with pytest.raises(Unavailable) as raised:
        pool_of(TINY, loaded)
    assert "secret" not in str(raised.value)


def test_layers_that_lie_apart_are_read_one_by_one(tmp_path: Path) -> None:
    """As in torch's pools."""
    row_format = RowFormat.of_torch(torch.bfloat16, CPU)
    store = AdapterStore(tmp_path)
    packed = PackedAdapters(store, RowLayout(TINY, row_format))
    adapter = published(ADAPTERS["odd ranks by layer, in bf16"](TINY))
    store.put(adapter)
    stored = packed.load(adapter.weights.digest)
    assert isinstance(stored, PackedFile)
    pools = []
    for one in (stored, adapter.weights):
        rows = RankRows(TINY, max_rank=40, row_format=row_format, device=CPU)
        rows.place(one, {group: Run(need, 6, 12) for group, need in rows.needs(one).items()})
        pools.append(
            {group: (a.clone() for a in rows.run(group, Run(need, 6, 12))) for group, need in stored.needs.items()}
        )
    for group, found in pools[0].items():
        for ours, expected in zip(found, pools[1][group], strict=True):
            assert torch.equal(ours, expected)


def test_sweep_removes_leftovers_of_killed_processes(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    adapter = published(ADAPTERS["all modules"](TINY))
    store.put(adapter)
    folder = tmp_path / "packed"
    (folder / ("0" * 64)).write_bytes(b"of nobody")
    for name, age in (("old", 7200), ("new", 0)):
        (folder / f"{UNFINISHED}{name}").write_bytes(b"half")
        os.utime(folder / f"{UNFINISHED}{name}", (time.time() - age,) * 2)
    store.sweep(lambda digest: True)
    assert sorted(path.name for path in folder.iterdir()) == sorted((f"{UNFINISHED}new", adapter.weights.digest))


def test_an_adapter_of_another_base_is_put_and_never_placed(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    for other in (BaseShape(4, TINY.features), BaseShape(3, dict(TINY.features) | {"o_proj": (64, 128)})):
        adapter = published(random_adapter(other, 0, rank=4))
        store.put(adapter)
        assert not packed_file(tmp_path, adapter.weights.digest).exists()
        stored = packed.load(adapter.weights.digest)
        settle()
        assert not packed_file(tmp_path, adapter.weights.digest).exists()
        with pytest.raises((ValueError, RuntimeError)):
            pool_of(TINY, stored)


def test_packing_is_delayed_if_no_thread_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path)
    adapter = published(ADAPTERS["all modules"](TINY))
    store.put(adapter)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        assert_same_pools(TINY, packed.load(adapter.weights.digest), adapter.weights)
    assert not packed_file(tmp_path, adapter.weights.digest).exists()
    packed.load(adapter.weights.digest)
    settle()
    assert packed_file(tmp_path, adapter.weights.digest).exists()


def test_one_packed_file_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of loads doesn't queue many writes: a skipped adapter is written at its next load."""
    store = AdapterStore(tmp_path)
    adapters = [published(random_adapter(TINY, seed, rank=2)) for seed in range(3)]
    for adapter in adapters:
        store.put(adapter)
    packed = PackedAdapters(store, RowLayout(TINY, ROW_FORMAT))
    go_on, keep = threading.Event(), PackedFiles.keep

    def slowly(files: PackedFiles, digest: str, pieces: Pieces) -> None:
        go_on.wait()
        keep(files, digest, pieces)

    monkeypatch.setattr(PackedFiles, "keep", slowly)
    for adapter in adapters:
        packed.load(adapter.weights.digest)
    go_on.set()
    settle()
    files = [packed_file(tmp_path, adapter.weights.digest).exists() for adapter in adapters]
    assert files == [True, False, False]
    packed.load(adapters[1].weights.digest)
    settle()
    assert packed_file(tmp_path, adapters[1].weights.digest).exists()
