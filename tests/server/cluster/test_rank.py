"""Routing: properties of the order, changes of the replicas, and the balance of queues."""

import ast
import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from server.cluster import rank as module
from server.cluster.rank import ALWAYS_OPEN, SPILL, Part, Replica, rank, room

DIGESTS = [f"{index:064x}" for index in range(6)]

parts_lists = st.lists(
    st.builds(Part, st.sampled_from(DIGESTS), st.integers(1, 10**9)),
    max_size=4,
    unique_by=lambda part: part.digest,
)
prefixes = st.lists(st.integers(0, 9), max_size=4, unique=True)
fleets = st.lists(
    st.builds(
        Replica,
        st.text(min_size=1, max_size=3),
        st.frozensets(st.sampled_from(DIGESTS)),
        st.integers(0, 30),
        st.frozensets(st.integers(0, 9)),
    ),
    max_size=12,
    unique_by=lambda replica: replica.id,
)


def idle(count: int) -> list[Replica]:
    return [Replica(f"replica-{index}", frozenset(), 0) for index in range(count)]


def limit_of(replicas: list[Replica]) -> int:
    return room(sum(replica.queue for replica in replicas), len(replicas))


def resident_bytes(parts: list[Part], replica: Replica) -> int:
    return sum(part.num_bytes for part in parts if part.digest in replica.resident)


def cached_run(prefix: list[int], replica: Replica) -> int:
    return next((i for i, block in enumerate(prefix) if block not in replica.cached), len(prefix))


@given(parts_lists, prefixes, fleets, st.randoms())
def test_rank_returns_every_replica_once_in_any_input_order(
    parts: list[Part], prefix: list[int], replicas: list[Replica], chance: random.Random
) -> None:
    order = rank(parts, prefix, replicas)
    assert sorted(order) == sorted(replica.id for replica in replicas)
    chance.shuffle(replicas)
    chance.shuffle(parts)
    assert rank(parts, prefix, replicas) == order


@given(parts_lists, prefixes, fleets)
def test_warm_replicas_precede_cold_and_full_ones(
    parts: list[Part], prefix: list[int], replicas: list[Replica]
) -> None:
    """Room comes first, then resident bytes, then the cached prefix, then the shortest queue, but not among cold
    replicas."""
    limit = limit_of(replicas)
    known = {replica.id: replica for replica in replicas}

    def key(name: str) -> tuple[bool, int, int, int]:
        replica = known[name]
        if replica.queue >= limit:
            return True, 0, 0, replica.queue
        resident, run = resident_bytes(parts, replica), cached_run(prefix, replica)
        return False, -resident, -run, replica.queue if resident or run or not parts else 0

    keys = [key(name) for name in rank(parts, prefix, replicas)]
    assert keys == sorted(keys)


@given(parts_lists, prefixes, fleets, st.data())
def test_a_subset_is_ordered_as_among_all_replicas(
    parts: list[Part], prefix: list[int], replicas: list[Replica], data: st.DataObject
) -> None:
    some = data.draw(st.lists(st.sampled_from(replicas), unique_by=lambda replica: replica.id)) if replicas else []
    chosen = {replica.id for replica in some}
    whole = [name for name in rank(parts, prefix, replicas) if name in chosen]
    assert rank(parts, prefix, some, limit_of(replicas)) == whole


@given(parts_lists, prefixes, fleets)
def test_the_first_replica_has_room(parts: list[Part], prefix: list[int], replicas: list[Replica]) -> None:
    assume(replicas)
    queues = {replica.id: replica.queue for replica in replicas}
    mean = (sum(queues.values()) + 1) / len(queues)
    assert queues[rank(parts, prefix, replicas)[0]] < max(ALWAYS_OPEN, math.ceil(SPILL * mean))


@given(parts_lists, prefixes, fleets, st.integers(0, 11))
def test_removing_a_replica_moves_only_its_own_adapters(
    parts: list[Part], prefix: list[int], replicas: list[Replica], gone: int
) -> None:
    """Unless a queue exceeds the bound: other adapters keep their order."""
    assume(len(replicas) > 1)
    left = [replica for index, replica in enumerate(replicas) if index != gone % len(replicas)]
    assume(
        {r.id for r in left if r.queue < limit_of(left)} == {r.id for r in left if r.queue < limit_of(replicas)}
    )
    ids = {replica.id for replica in left}
    assert rank(parts, prefix, left) == [name for name in rank(parts, prefix, replicas) if name in ids]


@pytest.mark.parametrize("count", [4, 20, 100])
def test_only_its_share_of_cold_adapters_moves(count: int) -> None:
    """They move only to or from the new replica, and evenly from or to all others."""
    parts = [[Part(f"digest {index}", 1)] for index in range(2000)]
    fleet = idle(count + 1)
    before = [rank(part, (), fleet[:-1])[0] for part in parts]
    after = [rank(part, (), fleet)[0] for part in parts]
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {new for _, new in moved} == {fleet[-1].id}
    expected = len(parts) / (count + 1)
    assert abs(len(moved) - expected) < 5 * math.sqrt(expected)
    assert max(Counter(old for old, _ in moved).values()) < 5 + 3 * len(moved) / count


def test_cold_adapters_are_spread_evenly() -> None:
    """Chi-squared with 99 degrees of freedom, for first and second homes: above 160 only once in 10,000."""
    fleet = idle(100)
    orders = [rank([Part(f"{random.Random(i).getrandbits(256):064x}", 1)], (), fleet) for i in range(5000)]
    for place in (0, 1):
        counts = Counter(order[place] for order in orders)
        assert sum((counts[replica.id] - 50) ** 2 / 50 for replica in fleet) < 160


@given(st.lists(st.tuples(st.sampled_from(DIGESTS), st.booleans()), min_size=1, max_size=200), st.integers(1, 12))
def test_queues_stay_balanced(requests: list[tuple[str, bool]], count: int) -> None:
    """If requests come one by one and none ends, no queue exceeds the bound, whichever adapters are hot."""
    fleet = {replica.id: replica for replica in idle(count)}
    for digest, base in requests:
        parts = [] if base else [Part(digest, 1)]
        chosen = fleet[rank(parts, (), list(fleet.values()))[0]]
        resident = chosen.resident | {part.digest for part in parts}
        fleet[chosen.id] = replace(chosen, queue=chosen.queue + 1, resident=resident)
    longest = max(replica.queue for replica in fleet.values())
    assert longest <= max(ALWAYS_OPEN, math.ceil(SPILL * len(requests) / count))


def test_a_hot_adapter_gets_more_homes_under_load() -> None:
    fleet = {replica.id: replica for replica in idle(10)}
    homes = []
    for _ in range(200):
        chosen = fleet[rank([Part("hot", 1)], (), list(fleet.values()))[0]]
        fleet[chosen.id] = replace(chosen, queue=chosen.queue + 1, resident=frozenset({"hot"}))
        homes.append(sum(bool(replica.resident) for replica in fleet.values()))
    assert homes[:ALWAYS_OPEN] == [1] * ALWAYS_OPEN
    assert homes[2 * ALWAYS_OPEN - 1] == 2
    assert homes[-1] >= 10 / SPILL


def test_a_prompt_goes_to_the_replica_with_its_blocks() -> None:
    fleet = [replace(replica, resident=frozenset({"a"}), queue=index) for index, replica in enumerate(idle(4))]
    fleet[2] = replace(fleet[2], cached={11, 12})
    fleet[3] = replace(fleet[3], cached={12, 13})  # not from the start
    part = [Part("a", 1)]
    assert rank(part, [11, 12, 13], fleet)[:2] == ["replica-2", "replica-0"]
    assert rank([], [11, 12, 13], fleet)[:2] == ["replica-2", "replica-0"]
    assert rank(part, [], fleet)[0] == "replica-0"
    assert rank(part, [11], [replace(fleet[2], queue=50), *fleet[:2]])[0] == "replica-0"


def test_the_largest_part_decides_the_home() -> None:
    fleet = idle(50)
    large, small = Part("large", 9), Part("small", 8)
    assert rank([small, large], (), fleet) == rank([large], (), fleet) != rank([small], (), fleet)
    warm = [replace(fleet[0], resident=frozenset({"small"})), replace(fleet[1], resident=frozenset({"large"}))]
    assert rank([small, large], (), warm)[0] == "replica-1"


def test_prompts_spread_over_equal_replicas() -> None:
    """Otherwise every router would send all requests between two reports to the same replica."""
    fleet = [replace(replica, resident=frozenset({"hot"})) for replica in idle(20)]
    assert len({rank([Part("hot", 1)], [prompt], fleet)[0] for prompt in range(200)}) == 20
    assert len({rank([], [prompt], fleet)[0] for prompt in range(200)}) == 20


def test_ranking_without_any_knowledge() -> None:
    assert rank([], (), []) == []
    assert rank([Part("a", 1)], [1], []) == []
    assert rank([], (), idle(1)) == ["replica-0"]


def test_every_process_computes_the_same_order() -> None:
    code = """
from server.cluster.rank import Part, Replica, rank
print(rank([Part("a", 1)], [3], [Replica(str(i), frozenset(), 0) for i in range(30)]))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_rank_imports_neither_ray_nor_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules <= {"math", "collections.abc", "dataclasses", "functools", "hashlib"}


def test_ranking_a_thousand_replicas_takes_about_a_millisecond() -> None:
    """0.6 ms on an idle machine; the bound is for a busy one."""
    chance = random.Random(0)
    fleet = [
        Replica(f"replica-{i}", frozenset(map(str, chance.sample(range(100_000), 64))), chance.randrange(32))
        for i in range(1000)
    ]
    took = []
    for prompt in range(20):
        started = time.perf_counter()
        rank([Part("7", 1), Part("8", 2)], [prompt], fleet)
        took.append(time.perf_counter() - started)
    assert min(took) < 0.02
