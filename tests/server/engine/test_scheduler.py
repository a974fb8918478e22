"""The scheduler: order, fairness, preemption, sharing, and adapters that load, fail or lack room."""

from adapters.lora import AdapterRef
from tests.server.engine.small import simulation, unlike


def test_chunks_of_one_prompt_do_not_depend_on_load() -> None:
    def borders(num_others: int) -> list[int]:
        sim, _ = simulation(num_blocks=200, max_num_seqs=16, max_prefill_tokens=16)
        (one,) = sim.add(unlike(99, 29), 3)
        for i in range(num_others):
            sim.add(unlike(i, 5 + i), 20)
        found = []
        while one in sim.live():
            found += [chunk.stop for chunk in sim.step().chunks if chunk.sequence is one]
        return found

    assert borders(0) == borders(3) == borders(12) == [8, 16, 24, 29, 30, 31]


def test_decodes_never_wait_for_prefills() -> None:
    sim, _ = simulation(num_blocks=400, max_num_seqs=32, max_prefill_tokens=16)
    runners = [sim.add(unlike(i, 3), 200)[0] for i in range(4)]
    for _ in range(4):
        sim.step()
    for i in range(20):
        sim.add(unlike(10 + i, 60), 5)
    for _ in range(50):
        scheduled = {chunk.sequence for chunk in sim.step().chunks}
        assert set(runners) <= scheduled


def test_a_cold_adapter_is_not_starved_by_a_hot_one() -> None:
    """However many sequences wait for the hot adapter, the cold one is admitted soon."""
    sim, _ = simulation(num_blocks=400, max_num_seqs=2, max_load_steps=3)
    for i in range(100):
        sim.add(unlike(i, 4), 4, ("hot",))
    for _ in range(5):
        sim.step()
    (cold,) = sim.add(unlike(1000, 4), 4, ("cold",))
    before = len(sim.admissions)
    for _ in range(30):
        sim.step()
    assert sim.admissions.index(cold) - before <= 6
    sim.drain(sim.bound())


def test_sets_take_turns() -> None:
    sim, _ = simulation(num_blocks=400, max_num_seqs=1, capacity=10)
    for name, count in (("a", 10), ("b", 3), ("c", 3)):
        for i in range(count):
            sim.add(unlike(100 * ord(name) + i, 4), 2, (name,))
    sim.drain(sim.bound())
    order = "".join(s.request.adapters[0].digest for s in sim.admissions)
    assert len(order) == 16
    first = order[order.index("b") - 1 :] if "b" in order else order
    assert sorted(first[:3]) == sorted("abc")
    assert order.endswith("aaaa")


def test_fifo_within_an_adapter_set() -> None:
    sim, _ = simulation(num_blocks=400, max_num_seqs=3)
    added = [sim.add(unlike(i, 4), 1 + i % 4, ("a",))[0] for i in range(20)]
    sim.drain(sim.bound())
    assert sim.admissions == added


def test_a_large_set_is_not_starved_by_a_stream_of_small_ones() -> None:
    """It needs the whole pool, of which a stream of small sets would always use a part."""
    sim, _ = simulation(num_blocks=400, max_num_seqs=4, capacity=3, max_bypass=5)
    large = None
    for step in range(300):
        if step == 10:
            (large,) = sim.add(unlike(10_000, 4), 4, ("x", "y", "z"))
        sim.add(unlike(step, 4), 6, ("abcdef"[step % 6],))
        sim.step()
        if large in sim.admissions:
            break
    assert large in sim.admissions, "it never got room"
    sim.drain(sim.bound())


def test_a_long_prompt_is_not_starved_by_a_stream_of_short_ones() -> None:
    sim, _ = simulation(num_blocks=20, max_num_seqs=8, max_bypass=5)
    long = None
    for step in range(400):
        if step == 20:
            (long,) = sim.add(unlike(10_000, 70), 5, ("a",))
        sim.add(unlike(step, 9), 4, ("b",) if step % 2 else ())
        sim.step()
        if long in sim.admissions:
            break
    assert long in sim.admissions, "it never got blocks"
    sim.drain(sim.bound())


def test_the_youngest_is_preempted_and_the_oldest_never() -> None:
    sim, _ = simulation(num_blocks=9, max_num_seqs=3, max_prefill_tokens=64)
    first, second, third = (sim.add(unlike(i, 8), 20)[0] for i in range(3))
    sim.drain(200)
    assert sim.scheduler.num_preemptions > 0
    assert sim.finished.index(first) < sim.finished.index(second) < sim.finished.index(third)
    assert sim.admissions.count(first) == 1
    assert sim.admissions.count(third) > 1


def test_prompts_that_do_not_fit_together_are_not_admitted_together() -> None:
    """Admission counts the blocks that admitted prompts will need, although they are reserved by chunk."""
    sim, _ = simulation(num_blocks=40, max_num_seqs=8, max_prefill_tokens=64)
    for i in range(8):
        sim.add(unlike(i, 62), 2)
    computed = 0
    while sim.scheduler.has_work:
        computed += sum(chunk.stop - chunk.start for chunk in sim.step().chunks)
    assert sim.scheduler.num_preemptions == 0
    assert computed == 8 * 63


def test_preempted_sequences_resume_first() -> None:
    sim, _ = simulation(num_blocks=8, max_num_seqs=2)
    sim.add(unlike(0, 8), 20)
    (second,) = sim.add(unlike(1, 8), 20, ("a",))
    waiting = sim.add(unlike(2, 8), 4, ("b",)) + sim.add(unlike(3, 8), 4, ("a",))
    sim.drain(200)
    assert sim.admissions.count(second) == 2
    last = len(sim.admissions) - 1 - sim.admissions[::-1].index(second)
    assert all(sim.admissions.index(other) > last for other in waiting)


def test_preemption_keeps_the_tokens_and_the_prompts_cached_count() -> None:
    sim, _ = simulation(num_blocks=6, max_num_seqs=2)
    sim.add(unlike(0, 8), 12)
    (second,) = sim.add(unlike(1, 8), 12)
    tokens: list[int] = []
    while second in sim.live():
        assert second.token_ids[: len(tokens)] == tokens
        tokens = list(second.token_ids)
        sim.step()
    assert sim.scheduler.num_preemptions > 0
    assert len(second.token_ids) == 20
    assert second.num_cached_tokens == 0, "what it finds again is its own"


def test_choices_of_one_request_compute_the_prompt_once() -> None:
    sim, _ = simulation(num_blocks=100, max_num_seqs=8)
    choices = sim.add(unlike(0, 33), 3, ("a",), n=4)
    computed = 0
    while sim.scheduler.has_work:
        computed += sum(c.stop - c.start for c in sim.step().chunks)
    assert computed == 33 + 3 * 1 + 4 * 2
    assert [choice.num_cached_tokens for choice in choices] == [0, 32, 32, 32]


def test_the_same_prompt_under_another_adapter_is_computed_again() -> None:
    sim, _ = simulation(num_blocks=100, max_num_seqs=8)
    one, other = sim.add(unlike(0, 33), 3, ("a",))[0], sim.add(unlike(0, 33), 3, ("b",))[0]
    sim.drain(100)
    assert (one.num_cached_tokens, other.num_cached_tokens) == (0, 0)


def test_a_prefix_is_computed_by_the_next_sequence_after_an_abort() -> None:
    sim, _ = simulation(num_blocks=100, max_num_seqs=8)
    choices = sim.add(unlike(0, 40), 3, n=3)
    sim.step()
    assert sim.scheduler.running == choices[:1]
    sim.abort(choices[0])
    sim.drain(100)
    assert sim.finished == choices[1:] or sim.finished == [choices[2], choices[1]]


def test_a_failing_adapter_fails_its_own_requests_only() -> None:
    sim, gate = simulation(failing=frozenset({"bad"}))
    broken = [*sim.add(unlike(0, 5), 3, ("bad",), n=2), *sim.add(unlike(1, 5), 3, ("a", "bad"))]
    fine = [*sim.add(unlike(2, 5), 3, ("a",)), *sim.add(unlike(3, 5), 3)]
    sim.drain(100)
    assert set(sim.failed) == set(broken)
    assert set(sim.finished) == set(fine)
    gate.failing = frozenset()
    (again,) = sim.add(unlike(0, 5), 3, ("bad",))
    sim.drain(100)
    assert again in sim.finished


def test_a_set_larger_than_the_pool_is_refused() -> None:
    sim, _ = simulation(capacity=2)
    (large,) = sim.add(unlike(0, 5), 3, ("a", "b", "c"))
    sim.drain(20)
    assert sim.failed == [large]


def test_cold_adapters_load_while_others_run() -> None:
    sim, gate = simulation(num_blocks=400, max_load_steps=10, max_num_seqs=1)
    sim.add(unlike(0, 4), 50)
    sim.step()
    (cold,) = sim.add(unlike(1, 4), 4, ("a",))
    for _ in range(15):
        assert sim.step().chunks, "the one that runs is not stalled"
    assert "a" in gate.loaded
    assert cold not in sim.admissions
    sim.drain(100)


def test_waiting_sequences_that_hold_adapters_give_way() -> None:
    """Waiting sets have read ahead and hold the whole pool when all places become free at once."""
    sim, gate = simulation(num_blocks=400, max_num_seqs=4, capacity=4, max_bypass=2, max_load_steps=2)
    for i in range(4):
        sim.add(unlike(i, 4), 12)
    sim.step()
    (large,) = sim.add(unlike(9, 4), 4, ("w", "x", "y", "z"))
    for i, digest in enumerate("abcd"):
        sim.add(unlike(20 + i, 4), 4, (digest,))
    sim.scheduler._waiting.set_of(large).num_bypassed = 2
    for _ in range(100):
        sim.step()
    assert large in sim.admissions
    sim.drain(sim.bound())
    assert not +gate.holds


def test_timestamps_and_counts_are_of_the_first_admission() -> None:
    sim, _ = simulation(num_blocks=6, max_num_seqs=2)
    sim.add(unlike(0, 8), 12)
    (second,) = sim.add(unlike(1, 8), 12)
    sim.step()
    admitted = second.admitted_at
    sim.drain(200)
    assert sim.scheduler.num_preemptions > 0
    assert admitted is not None
    assert second.admitted_at == admitted


def test_the_adapter_key_depends_on_all_adapters() -> None:
    sim, _ = simulation()
    (one,) = sim.add((1, 2, 3), 2, ("b", "a"))
    assert one.request.adapters == (AdapterRef("a"), AdapterRef("b"))
    sim.drain(20)
