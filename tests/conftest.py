"""Scheduling and order of the tests. Shared fixtures are in tests/kits/bases.py."""

import ctypes
import gc
import os
import platform

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.kits.properties import set_default

GROUPS = {
    "exact_server": ("test_adapter_life.py", "test_blends.py", "test_exact_answers.py", "test_trained_adapter.py"),
    "shared_server": (
        "test_hard_times.py",
        "test_langchain.py",
        "test_openai_client.py",
        "test_overflow.py",
        "test_processes.py",
        "test_streams_and_sampling.py",
        "test_structured_output.py",
    ),
    "trainers": ("test_evaluating.py", "test_fine_tuning.py", "test_merging.py", "test_real_training.py"),
}
"""Files of end_to_end that share servers, so that one process should run them.

xdist's own way, `--dist loadgroup`, has no effect with pytest 9.2: xdist 3.8 appends the group to `item._nodeid`,
which pytest doesn't read any more.
"""
LONG = (
    "test_emulated.py",
    "test_readme.py",
    *GROUPS["exact_server"],
    *GROUPS["shared_server"],
    *GROUPS["trainers"],
    "test_worker.py",
    "test_kernels.py",
    "test_page.py",
    "test_use.py",
    "test_lesser_processors.py",
    "test_real_worker.py",
    "test_exact_match.py",
    "test_against_peft.py",
    "test_smollm.py",
    "test_native_parity.py",
    "test_job_files.py",
    "test_native_pass.py",
    "test_native_full.py",
    "test_run_job.py",
    "test_stopping.py",
    "test_news.py",
    "test_supervisor.py",
    "test_hanging_server.py",
    "test_attacks.py",
    "test_failing_disk.py",
    "test_sign_in.py",
)
"""The slowest files, in that order. They start first, so that all processes end at about the same time. The order
of pytest's cache won't do: CI starts from a bare checkout."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
KEPT_BYTES = 256 << 20


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # objects of imports and of the collection live until the end
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # this process distributes tests and doesn't need the libraries under test
    os.environ["OMP_NUM_THREADS"] = "1"  # also for servers and their jobs, except with `default_threads`
    keep_freed_memory()
    config.pluginmanager.import_plugin("tests.kits.bases")
    set_default()


def keep_freed_memory() -> None:
    """Make this process, but not its children, reuse freed tensors' memory: the kernel zeroes new pages first."""
    if platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        malloc.mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)  # with the default of 700, collections took 4 % of the time
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests: first `LONG` files, then other tests that start servers, then the rest."""

    def rank(item: pytest.Item) -> int:
        if item.path.name in LONG:
            return LONG.index(item.path.name)
        return len(LONG) if item.path.parent.name == "end_to_end" else len(LONG) + 1

    items.sort(key=rank)


class Scheduling(LoadFileScheduling):
    """Runs the tests of a file, or of files in `GROUPS`, in one process, so that their servers start once."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        folder, _, name = file.rpartition("/")
        units = (unit for unit, names in GROUPS.items() if folder.endswith("end_to_end") and name in names)
        return next(units, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None
