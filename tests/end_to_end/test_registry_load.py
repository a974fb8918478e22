"""A short run of `tests.stress.registry_load`, which has the full load, on a tiny base."""

from pathlib import Path
from typing import Any

import pytest

from server.model.base.weights import BaseModel
from tests.end_to_end.server_process import ServerProcess
from tests.server.running import running
from tests.stress.registry_changes import Timeline
from tests.stress.registry_load import Plan, adapter_files, judge, load, unsound

KINDS = (
    *("generate: 404", "upload: 201", "move prod: 200", "move latest: 200", "delete a version: 204"),
    "compose: 201",
)


@pytest.mark.thorough
def test_answers_are_those_of_the_named_versions(
    converted_tiny: Path, tiny_base: BaseModel, tmp_path: Path
) -> None:
    plan = Plan(seconds=6, max_tokens=8, pause=0.25, num_answers=200, kinds=KINDS)
    files = adapter_files(tiny_base.config.shape)
    options: dict[str, Any] = {"dtype": "fp32", "max_num_seqs": plan.num_clients, "kv_cache_bytes": "32MiB"}
    server = ServerProcess(tmp_path / "load", model=converted_tiny, adapter_cache_bytes="4MiB", **options)
    try:
        answers, changers, faults = load(server, plan, files)
        server.wait_until_idle()
        server.terminate()  # a killed server may leave bytes that a thread is about to remove
        assert server.exit_code() == 0
    finally:
        server.close()
    with running(tmp_path / "cold", converted_tiny, kv_cache_bytes="32MiB") as cold:
        outcome = judge(plan, answers, changers, cold, files)
    assert faults + outcome.faults[:5] == []
    assert unsound(tmp_path / "load") == []
    counts = outcome.counts
    assert counts["generate: 200"] > 50
    assert counts["generate: cached tokens"] > 0
    assert outcome.num_sums > 20
    for what in KINDS:
        assert counts[what] > 0, counts


def test_timeline_returns_possible_meanings() -> None:
    one, two = (("a", 1, 1.0),), (("a", 2, 1.0),)
    timeline = Timeline()
    assert timeline.possible(0, 9) == [None]
    timeline.set(10, 12, one)
    timeline.set(13, 14, one)  # the same: no change
    timeline.set(20, 22, two)
    assert timeline.possible(1, 9) == [None]
    assert timeline.possible(1, 10) == [None, one]
    assert timeline.possible(11, 11.5) == [None, one]
    assert timeline.possible(12.5, 19) == [one]
    assert timeline.possible(12.5, 21) == [one, two]
    assert timeline.possible(23, 24) == [two]
