"""The simulation of routing: choices of policies, loads and evictions of a replica, and a reduced run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import command
from benchmarks.routing.__main__ import WORLDS, main, quick
from benchmarks.routing.knowledge import DEAD, Knowledge
from benchmarks.routing.policies import POLICIES, Ours, Policy, policy
from benchmarks.routing.replicas import Host
from benchmarks.routing.report import Results
from benchmarks.routing.simulate import Outcome, Simulation, simulate
from benchmarks.routing.world import PREFIX_TOKENS, RANK_BYTES, Request, World, requests
from server.cluster.rank import Part, rank

SMALL = replace(quick(WORLDS[0]), num_requests=1500, warm_up=500, failures=2.0)


class Checked:
    """Our policy, with each choice compared with the order of all replicas."""

    contents = True

    def __init__(self) -> None:
        self.ours = Ours()
        self.num_checked = 0

    def choose(self, request: Request, known: Knowledge, now: float) -> int | None:
        chosen = self.ours.choose(request, known, now)
        everybody = known.replicas(range(len(known.queues)))
        assert rank(request.parts, request.prefix, everybody)[0] == f"replica-{chosen}"
        self.num_checked += 1
        return chosen

    def backoff(self, request: Request) -> float:
        return self.ours.backoff(request)


def request(*parts: Part, prefix: tuple[int, ...] = (), arrival: float = 0.0) -> Request:
    return Request(arrival, 0, parts, prefix, prompt_tokens=100, output_tokens=10, counted=True)


def test_the_index_finds_the_first_of_rank() -> None:
    simulation = Simulation("ours", SMALL)
    checked: Policy = Checked()
    simulation.policy = checked
    outcome = simulation.run()
    assert isinstance(checked, Checked)
    assert checked.num_checked >= SMALL.num_requests
    assert outcome == simulate(("ours", SMALL))  # repeatable
    assert outcome.retried


def test_requests_follow_the_worlds_parameters() -> None:
    world = World("as it is", num_requests=20_000, warm_up=5000)
    drawn = list(requests(world))
    arrivals = [one.arrival for one in drawn]
    assert arrivals == sorted(arrivals)
    assert sum(one.counted for one in drawn) == 15_000
    assert 0.09 < sum(not one.parts for one in drawn) / 20_000 < 0.11
    named = [one for one in drawn if one.parts]
    first = sum(one.parts[0].digest == "00000" for one in named) / len(named)
    assert first == pytest.approx(1 / (np.log(100_000) + 0.577), rel=0.1)  # the first share
    texts: dict[int, tuple[Part, ...]] = {}
    assert all(texts.setdefault(text, one.parts) == one.parts for one in drawn for text in one.prefix)
    decode = world.batch_token_time(32) * np.mean([one.output_tokens for one in drawn])
    busy = decode + world.prefill_time * np.mean([one.prompt_tokens for one in drawn])
    assert 20_000 / arrivals[-1] * busy / 32_000 == pytest.approx(0.7, rel=0.05)


def test_replica_loads_waits_and_evicts() -> None:
    world = World("two places", places=2, load_latency=1.0, load_bandwidth=RANK_BYTES, prefill_time=0.0)
    host = Host(0, world)
    a, b, c = (Part(name, world.capacity // 2) for name in "abc")
    seconds = 1.0 + a.num_bytes / RANK_BYTES
    first, again = request(a), request(a)
    host.waiting += [first, again, request(b), request(c)]
    started = host.start(10.0)
    assert started is not None
    assert (started.loads, started.first_token) == (1, 10.0 + seconds)
    assert started.end == started.first_token + 10 * world.batch_token_time(1)
    waits = host.start(11.0)
    assert waits is not None
    assert (waits.loads, waits.first_token) == (0, 10.0 + seconds)  # it waits for the same load
    assert host.start(11.0) is not None
    assert host.start(12.0) is None  # no room for c while a and b are in use
    host.finish(first)
    assert host.start(12.0) is None
    host.finish(again)
    assert host.start(12.0) is not None
    assert set(host.resident) == {"b", "c"}
    assert host.num_bytes == world.capacity // 2 * 2
    assert len(host.fail()) == 2
    assert (host.queue, host.num_bytes, host.resident) == (0, 0, {})


def test_a_shared_text_is_computed_once() -> None:
    world = World("texts", prefix_places=1)
    host = Host(0, world)
    times = []
    for text in (1, 1, 2, 1):
        one = request(prefix=(text,))
        host.waiting.append(one)
        started = host.start(0.0)
        assert started is not None
        times.append(round(started.first_token / world.prefill_time))
        host.finish(one)
    assert times == [100 + PREFIX_TOKENS, 100, 100 + PREFIX_TOKENS, 100 + PREFIX_TOKENS]


@pytest.mark.parametrize("name", POLICIES)
def test_replicas_known_to_be_down_get_no_requests(name: str) -> None:
    simulation = Simulation(name, replace(SMALL, num_replicas=3))
    known = simulation.known[0]
    known.queues = np.array([DEAD, DEAD, 1])
    for parts in ((), (Part("00000", 1),)):
        assert simulation.policy.choose(request(*parts), known, 0.0) == 2


def test_multiplexed_waits_for_full_replicas_then_takes_any() -> None:
    world = replace(SMALL, num_replicas=4)
    hosts = [Host(index, world) for index in range(4)]
    for host in hosts:
        host.waiting += [request()] * 40
    multiplexed = policy("multiplexed", world, hosts)
    simulation = Simulation("multiplexed", world)
    known, one = simulation.known[0], request(Part("00000", 1))
    known.queues = np.full(4, 40)
    pauses = []
    for _ in range(8):
        assert multiplexed.choose(one, known, 0.0) is None
        pauses.append(multiplexed.backoff(one))
    assert pauses == [0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    hosts[3].waiting.clear()
    assert 3 in {multiplexed.choose(one, known, 3.0) for _ in range(50)}


def test_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match="no policy none"):
        policy("none", SMALL, [])


@pytest.mark.thorough  # its parts are tested above
def test_reduced_run(tmp_path: Path) -> None:
    """At any size, `rank` loads far less than policies that ignore residency, and queues stay even."""
    main(["--quick", "--out", str(tmp_path), "--processes", "2"])
    results = command.read(tmp_path, "routing", Results)
    assert results is not None
    assert len(results.outcomes) == len(POLICIES) * len(WORLDS)
    for world in results.worlds:
        found: dict[str, Outcome] = {one.policy: one for one in results.of(world)}
        ours = found["ours"]
        assert ours.cold_share < 0.6 * found["robin"].cold_share
        assert ours.bytes_loaded < 0.6 * found["two"].bytes_loaded
        assert ours.cached_share > found["multiplexed"].cached_share
        assert ours.imbalance < 2
        assert found["home"].wait_p99 > 2 * ours.wait_p99
    page = (tmp_path / "routing.md").read_text(encoding="utf-8")
    assert page.count("|`rank`|") == len(WORLDS)
    assert "A quick run" in page
    chart = (tmp_path / "routing.svg").read_bytes()
    main(["--report", "--out", str(tmp_path)])
    assert (tmp_path / "routing.md").read_text(encoding="utf-8") == page
    assert (tmp_path / "routing.svg").read_bytes() == chart


def test_report_needs_results(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run it without --report first"):
        main(["--report", "--out", str(tmp_path)])
