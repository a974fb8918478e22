"""A database that hangs delays a scrape once, by half a second at most."""

import threading

import pytest

from server.engine.request import EngineStats
from server.metrics.aside import Aside
from server.metrics.engine import GatewayCollector


def test_results_and_errors_are_passed_on() -> None:
    aside = Aside(60.0)
    assert aside.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        aside.run(lambda: 1 // 0)


def test_a_read_that_hangs_is_left_alone() -> None:
    aside, may_end, ended = Aside(0.01), threading.Event(), threading.Event()

    def hang() -> None:
        may_end.wait(60)
        ended.set()

    with pytest.raises(TimeoutError):
        aside.run(hang)
    for _ in range(3):
        with pytest.raises(TimeoutError, match="hasn't ended"):
            aside.run(lambda: pytest.fail("one read at a time"))
    may_end.set()
    assert ended.wait(60)
    aside = Aside(60.0)
    assert aside.run(lambda: 7) == 7


def test_names_of_adapters_stay_known_while_the_database_hangs() -> None:
    hangs, end = threading.Event(), threading.Event()
    resident = {"a"}

    def names(digests: frozenset[str]) -> list[str]:
        if hangs.is_set():
            end.wait(60)
        return sorted(digests)

    stats = lambda: EngineStats(resident=frozenset(resident))  # noqa: E731
    collector = GatewayCollector(stats, "base", names, lambda: 0, 16)

    def running() -> str:
        return next(
            sample.labels["running_lora_adapters"]
            for family in collector.collect()
            for sample in family.samples
            if family.name == "vllm:lora_requests_info"
        )

    assert running() == "a"
    hangs.set()
    resident.add("b")
    assert running() == "a"
    end.set()
