"""Limits of cgroups: the least one between the process' own cgroup and the root."""

import os
from pathlib import Path

import pytest

from server.system.cgroups import cpu_quota, memory_left, usable_processors

GIB = 1 << 30


def write(folder: Path, **files: str | int) -> None:
    """Make a cgroup's folder with these files; `_` in the first part of a name is a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def own(folder: Path, *lines: str) -> Path:
    file = folder / "own"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_a_service_has_its_own_memory_limit(tmp_path: Path) -> None:
    """The root has no limit, as on any machine with systemd."""
    write(tmp_path / "system.slice/smolora.service", memory_max=10 * GIB, memory_current=3 * GIB)
    write(tmp_path / "system.slice", memory_max="max", memory_current=20 * GIB)
    assert memory_left(tmp_path, own(tmp_path, "0::/system.slice/smolora.service")) == 7 * GIB


def test_the_least_limit_above_the_process_counts(tmp_path: Path) -> None:
    write(tmp_path / "a/b", memory_max=10 * GIB, memory_current=GIB, cpu_max="400000 100000")
    write(tmp_path / "a", memory_max=12 * GIB, memory_current=11 * GIB, cpu_max="150000 100000")
    write(tmp_path, memory_max=64 * GIB, memory_current=GIB, cpu_max="max 100000")
    file = own(tmp_path, "0::/a/b")
    assert memory_left(tmp_path, file) == GIB
    assert cpu_quota(tmp_path, file) == 1.5


def test_version_1_has_a_tree_for_each_controller(tmp_path: Path) -> None:
    file = own(tmp_path, "5:cpu,cpuacct:/docker/abc", "4:memory:/docker/abc", "1:name=systemd:/else", "0::/")
    write(tmp_path / "cpu,cpuacct/docker/abc", cpu_cfs_quota_us=200_000, cpu_cfs_period_us=100_000)
    write(tmp_path / "cpu,cpuacct", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100_000)
    write(tmp_path / "memory/docker/abc", memory_limit_in_bytes=2 * GIB, memory_usage_in_bytes=GIB)
    write(tmp_path / "memory", memory_limit_in_bytes=(1 << 63) - 4096, memory_usage_in_bytes=5 * GIB)
    assert cpu_quota(tmp_path, file) == 2
    assert memory_left(tmp_path, file) == GIB


@pytest.mark.parametrize("path", ["/docker/abc", "/../../elsewhere"])
def test_a_container_that_sees_its_own_cgroup_as_the_root(path: str, tmp_path: Path) -> None:
    """The path is the host's, and isn't mounted here."""
    write(tmp_path, cpu_max="50000 100000", memory_max=GIB, memory_current=0)
    assert cpu_quota(tmp_path, own(tmp_path, f"0::{path}")) == 0.5
    assert memory_left(tmp_path, own(tmp_path, f"0::{path}")) == GIB


def test_no_cgroups_mean_no_limits(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "absent") is None
    assert memory_left(tmp_path, tmp_path / "absent") is None
    write(tmp_path, cpu_max="max 100000", memory_max="max", memory_current=1)
    assert cpu_quota(tmp_path, own(tmp_path, "0::/")) is None
    assert memory_left(tmp_path, own(tmp_path, "0::/")) is None


@pytest.mark.parametrize(
    ("folder", "names", "prefix"),
    [
        (".", ("memory.max", "memory.current"), ""),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"),
    ],
)
def test_cached_files_count_as_free_memory(
    folder: str, names: tuple[str, str], prefix: str, tmp_path: Path
) -> None:
    """A container in which gigabytes were installed or copied is full of cached files until memory is needed."""
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    for name, number in zip(names, (1000, 990), strict=True):
        (place / name).write_text(f"{number}\n")
    (place / "memory.stat").write_text(f"anon 250\ninactive_file 1\n{prefix}inactive_file 700\nactive_file 40\n")
    assert memory_left(tmp_path, tmp_path / "absent") == 710


def test_a_quota_is_rounded_up_to_whole_processors(tmp_path: Path) -> None:
    visible = len(os.sched_getaffinity(0))
    for quota, expected in (
        ("max", visible),
        (10_000, 1),
        (100_000, 1),
        (100_001, min(2, visible)),
        (10**9, visible),
    ):
        write(tmp_path, cpu_max=f"{quota} 100000")
        assert usable_processors(tmp_path, own(tmp_path, "0::/")) == expected
