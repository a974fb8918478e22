"""Memory for the two caches where nobody says how much."""

from pathlib import Path

import pytest
import torch

from server.api.sizing import _cgroup, _meminfo, cache_sizes, free_bytes
from server.config import Settings

GIB = 1 << 30
SEQUENCE = 8192 * 23_040  # bytes of a full one


def sizes(free: int, *, is_cuda: bool = False, **settings: object) -> tuple[int, int]:
    found = cache_sizes(
        Settings.model_validate(settings), free, is_cuda=is_cuda, kv_bytes_per_token=23_040, max_model_len=8192
    )
    return found.kv_cache, found.adapter_cache


def test_a_share_of_what_is_free() -> None:
    assert sizes(16 * GIB) == (2 * GIB, 2 * GIB)
    assert sizes(9 * GIB, is_cuda=True) == (3 * GIB, 3 * GIB)


def test_never_less_than_one_sequence_nor_more_than_all() -> None:
    assert sizes(GIB // 2) == (SEQUENCE, 64 << 20)
    assert sizes(500 * GIB) == (32 * SEQUENCE, 8 * GIB)
    assert sizes(500 * GIB, max_num_seqs=4)[0] == 4 * SEQUENCE


def test_settings_win() -> None:
    assert sizes(16 * GIB, kv_cache_bytes="1MiB", adapter_cache_bytes=5 << 20) == (1 << 20, 5 << 20)


def test_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:   64 kB\n")
    assert _meminfo(tmp_path / "meminfo") == 64 * 1024
    assert _meminfo(tmp_path / "absent") is None
    assert _cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert _cgroup(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup(tmp_path) is None


def test_this_machine_has_memory() -> None:
    assert free_bytes(torch.device("cpu")) > 1 << 20


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_card_has_memory() -> None:
    assert free_bytes(torch.device("cuda")) > 1 << 20
