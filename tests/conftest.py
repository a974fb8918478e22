"""Which process runs which tests, and in which order; what they share is in bases.py, which those alone import."""

import ctypes
import gc
import os
import platform

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.kits.properties import set_default

SHARED = {
    "exact_server": ("test_adapter_life.py", "test_blends.py", "test_exact_answers.py", "test_trained_adapter.py"),
    "shared_server": (
        "test_hard_times.py",
        "test_openai_client.py",
        "test_overflow.py",
        "test_processes.py",
        "test_streams_and_sampling.py",
        "test_structured_output.py",
    ),
    "trainers": ("test_fine_tuning.py", "test_merging.py", "test_real_training.py"),
}
"""The files of end_to_end whose tests ask for the same servers."""
LONG = (
    "test_emulated.py",
    "test_readme.py",
    *SHARED["exact_server"],
    *SHARED["shared_server"],
    *SHARED["trainers"],
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
"""What takes longest, in that order. It begins first, so that all processes end at about the same time."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt."""
KEPT_BYTES = 256 << 20


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # what is imported and collected from here on stays: looking for garbage in it finds none
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # this process hands tests out, and needs none of the libraries that they run on
    os.environ["OMP_NUM_THREADS"] = "1"  # so have servers and their jobs, but for `default_threads`
    keep_freed_memory()
    config.pluginmanager.import_plugin("tests.kits.bases")
    set_default()


def keep_freed_memory() -> None:
    """Have this process, and none that it starts, use freed tensors' memory again: new pages are zeroed first."""
    if platform.libc_ver()[0] == "glibc":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        malloc.mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)  # by 700, the default, 4 % of the time went into looking for garbage
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is `LONG`, then what starts servers, then the rest."""

    def rank(item: pytest.Item) -> int:
        if item.path.name in LONG:
            return LONG.index(item.path.name)
        return len(LONG) if item.path.parent.name == "end_to_end" else len(LONG) + 1

    items.sort(key=rank)


class Scheduling(LoadFileScheduling):
    """Runs a file's tests in one process, and those that share servers in one, too: they are started once."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        folder, _, name = file.rpartition("/")
        units = (unit for unit, names in SHARED.items() if folder.endswith("end_to_end") and name in names)
        return next(units, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None
