"""The computation of masks: the budget of a step, projects' turns, and unchanged answers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from llguidance import LLExecutor, LLMatcher

from adapters.errors import InvalidInput
from server.engine import masks
from server.engine.engine import Engine
from server.engine.guidance import Constraint, Guidance, Mask, masks_of
from server.engine.masks import Masks
from server.engine.request import GenerationRequest, Grammar, SamplingParams, SequenceOutput
from server.engine.sequence import Sequence
from server.model.base.weights import BaseModel
from tests.kits.engines import GREEDY, build_engine, check_idle, run
from tests.kits.grammars import CODES, guidance_of
from tests.server.engine.traffic import prompt

EOS = 2
FREE = Grammar("regex", "[a-z ]{3,60}")
OTHER = Grammar("regex", "[a-y ]{3,60}")
PLAIN = replace(GREEDY, ignore_eos=False, max_tokens=24)
SLOW = 1.0  # seconds of a mask, more than any step may use


@pytest.fixture(scope="module")
def guidance(tiny_base: BaseModel) -> Iterator[Guidance]:
    guidance = guidance_of(tiny_base.tokenizer, tiny_base.config.vocab_size, (EOS,))
    for grammar in (CODES.grammar, FREE, OTHER):
        guidance.check(grammar)
    yield guidance
    guidance.close()


@pytest.fixture(autouse=True)
def as_measured(guidance: Guidance) -> None:
    """Give each test grammars whose masks have been fast so far."""
    for grammar in (CODES.grammar, FREE, OTHER):
        guidance.constraint(grammar).compiled.mask_seconds = 0.0


class Gate:
    """A gate that counts masks requested from the other thread, and holds them back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.batches: list[list[LLMatcher]] = []
        monkeypatch.setattr(masks, "masks_of", self._masks_of)

    def _masks_of(self, executor: LLExecutor, matchers: list[LLMatcher], vocab_size: int) -> list[Mask | None]:
        self.batches.append(matchers)
        self.entered.set()
        assert self.opened.wait(60)
        return masks_of(executor, matchers, vocab_size)


def asking(
    name: str, grammar: Grammar | None, project: str = "a", sampling: SamplingParams = PLAIN
) -> GenerationRequest:
    return GenerationRequest(name, prompt(20), sampling, grammar=grammar, project=project)


def step_until_all_wait(engine: Engine, name: str) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    sequences = [s for s in engine.scheduler.sequences() if s.request.request_id.startswith(name)]
    while not all(sequence.awaits_mask for sequence in sequences):
        assert len(outputs) < 100, "no mask is left to the other thread"
        outputs += engine.step()
    return outputs


@contextmanager
def closing(engine: Engine, gate: Gate) -> Iterator[None]:
    try:
        yield
    finally:
        gate.opened.set()
        engine.close()


def test_a_slow_mask_does_not_delay_other_sequences(
    tiny_base: BaseModel, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask's sequence skips steps, whether it runs or waits for admission, without any other disadvantage."""
    alone = run(build_engine(tiny_base, guidance=guidance), [asking("slow", FREE), asking("late", FREE)])
    gate, woken = Gate(monkeypatch), threading.Event()
    engine = build_engine(tiny_base, guidance=guidance, wake=woken.set)
    guidance.constraint(FREE).compiled.mask_seconds = SLOW
    with closing(engine, gate):
        engine.add(asking("slow", FREE))
        engine.add(asking("free", None, "b", replace(GREEDY, max_tokens=40)))
        outputs = step_until_all_wait(engine, "slow")
        engine.add(asking("late", FREE))
        while any(s.request.request_id == "free" for s in engine.scheduler.sequences()):
            news = engine.step()
            assert {output.request_id for output in news} == {"free"}
            outputs += news
        assert not engine.step()  # nothing is left that could run
        assert gate.entered.wait(60)
        assert not woken.is_set()
        gate.opened.set()
        assert woken.wait(60)
        while engine.has_work:
            outputs += engine.step()
        check_idle(engine)
    for name in ("slow", "late"):
        found = [output for output in outputs if output.request_id == name]
        assert "".join(output.text for output in found) == alone[name, 0].text
        chosen = [entry.chosen.token_id for output in found for entry in output.logprobs]
        assert chosen == alone[name, 0].token_ids
        assert found[-1].finish_reason == alone[name, 0].finish_reason
        assert found[-1].num_output_tokens == len(alone[name, 0].token_ids)


def test_answers_are_the_same_wherever_masks_are_computed(
    tiny_base: BaseModel, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        asking(
            f"r{number}",
            (FREE, CODES.grammar, OTHER, None)[number % 4],
            "ab"[number % 2],
            replace(PLAIN, seed=number, temperature=float(number % 3)),
        )
        for number in range(10)
    ]
    here = run(build_engine(tiny_base, guidance=guidance), requests)
    monkeypatch.setattr(masks, "_SHARE", -1.0)
    monkeypatch.setattr(masks, "_LEAST_SECONDS", -1.0)
    gate = Gate(monkeypatch)
    gate.opened.set()
    there = run(build_engine(tiny_base, guidance=guidance), requests)
    assert len(gate.batches) > 10
    for key, result in here.items():
        assert (there[key].token_ids, there[key].text) == (result.token_ids, result.text)
        assert there[key].finish_reason == result.finish_reason


def test_a_failing_mask_only_fails_its_sequence(
    tiny_base: BaseModel, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(masks, "masks_of", fail)
    engine = build_engine(tiny_base, guidance=guidance)
    guidance.constraint(FREE).compiled.mask_seconds = SLOW
    results = run(engine, [asking("bad", FREE), asking("good", CODES.grammar, project="b")])
    assert isinstance(results["bad", 0].error, InvalidInput)
    assert results["good", 0].error is None
    engine.close()


def test_nothing_is_computed_for_a_sequence_that_has_ended(
    tiny_base: BaseModel, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, woken = Gate(monkeypatch), threading.Event()
    engine = build_engine(tiny_base, guidance=guidance, wake=woken.set)
    for grammar in (FREE, OTHER):
        guidance.constraint(grammar).compiled.mask_seconds = SLOW
    with closing(engine, gate):
        engine.add(asking("first", OTHER))
        step_until_all_wait(engine, "first")
        assert gate.entered.wait(60)
        engine.add(asking("gone", FREE))
        step_until_all_wait(engine, "gone")
        engine.abort("gone")
        gate.opened.set()
        while guidance.constraint(FREE).awaits_mask:
            assert woken.wait(60)
            woken.clear()
        assert [len(batch) for batch in gate.batches] == [1]
        engine.abort("first")
        check_idle(engine)


def lacking(guidance: Guidance, num: int, project: str, grammar: Grammar = FREE) -> list[Sequence]:
    """Return sequences that have one token of their answers each."""
    found = []
    for number in range(num):
        sequence = Sequence(asking(f"{project}{number}", grammar, project), 0, 0.0, 16)
        sequence.constraint = constraint = guidance.constraint(grammar)
        constraint.accept(int((~constraint.forbidden()).nonzero()[0][0]))  # type: ignore[operator]
        found.append(sequence)
    return found


def constraint_of(sequence: Sequence) -> Constraint:
    assert isinstance(sequence.constraint, Constraint)
    return sequence.constraint


def num_there(sequences: list[Sequence]) -> int:
    return sum(not constraint_of(sequence).lacks_mask for sequence in sequences)


def test_projects_have_equal_shares_of_a_step(
    tiny_base: BaseModel, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that is slower than expected uses up its own project's share of this and later steps."""
    gate = Gate(monkeypatch)
    now = [0.0]
    seconds = {"a": 3e-3, "b": 1e-4}

    def compute(constraint: Constraint) -> bool:
        now[0] += seconds["a" if constraint.compiled is guidance.constraint(FREE).compiled else "b"]
        return constraint.compute_mask()

    monkeypatch.setattr(masks, "thread_time", lambda: now[0])
    monkeypatch.setattr(masks, "_is_computed", compute)
    all_masks = Masks(tiny_base.config.vocab_size, lambda: None)
    slow, quick = lacking(guidance, 8, "a"), lacking(guidance, 8, "b", OTHER)
    all_masks.prepare([])
    now[0] += 20e-3  # a step's, of which 2 ms are for masks, and 1 ms for each project
    all_masks.prepare([*slow, *quick])
    assert num_there(slow) == 1  # which took 2 ms too much
    assert num_there(quick) == 8
    assert constraint_of(slow[-1]).awaits_mask
    assert not constraint_of(quick[-1]).awaits_mask
    gate.opened.set()
    for expected in (0, 0, 1):  # 2 ms are owed, then 1 ms, then none
        while constraint_of(slow[0]).awaits_mask:
            pass
        now[0] += 20e-3
        before = now[0]
        all_masks.prepare([*lacking(guidance, 1, "a"), *lacking(guidance, 1, "b", OTHER)])
        assert now[0] - before == pytest.approx(expected * seconds["a"] + seconds["b"])
    all_masks.close()


def test_a_slow_grammar_takes_no_time_of_a_step(
    tiny_base: BaseModel, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    monkeypatch.setattr(masks, "_is_computed", lambda constraint: pytest.fail("computed here"))
    all_masks = Masks(tiny_base.config.vocab_size, lambda: None)
    sequences = lacking(guidance, 8, "a")
    constraint_of(sequences[0]).compiled.mask_seconds = 1e-3
    all_masks.prepare(sequences)
    gate.opened.set()
    while constraint_of(sequences[0]).awaits_mask:
        pass
    assert num_there(sequences) == 8
    assert constraint_of(sequences[0]).compiled.mask_seconds == pytest.approx(0.9e-3)  # so that it's tried again
    all_masks.close()


def test_the_other_thread_takes_the_projects_in_turn(
    tiny_base: BaseModel, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A project with one mask waits for at most four of an earlier project's many masks."""
    gate = Gate(monkeypatch)
    all_masks = Masks(tiny_base.config.vocab_size, lambda: None)
    many, one = lacking(guidance, 12, "a"), lacking(guidance, 1, "b", OTHER)
    for sequence in (many[0], one[0]):
        constraint_of(sequence).compiled.mask_seconds = SLOW
    all_masks.prepare(many)
    assert gate.entered.wait(60)
    all_masks.prepare(one)
    gate.opened.set()
    while constraint_of(many[0]).awaits_mask:
        pass
    order = [matcher for batch in gate.batches for matcher in batch]
    assert len(order) == 13
    assert [matcher is constraint_of(one[0]).matcher for matcher in order].index(True) in (4, 5)
    all_masks.close()


def test_a_new_answer_needs_no_mask_at_first(guidance: Guidance) -> None:
    for grammar in (CODES.grammar, FREE):
        assert not guidance.constraint(grammar).lacks_mask


def test_drafts_use_the_rest_of_the_mask_budget(
    tiny_base: BaseModel, guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(masks, "thread_time", lambda: now[0])
    all_masks = Masks(tiny_base.config.vocab_size, lambda: None)
    sequences = lacking(guidance, 2, "a")
    for sequence in sequences:
        constraint_of(sequence).compute_mask()
    constraint_of(sequences[0]).compiled.mask_seconds = 2e-4
    all_masks.prepare(sequences)
    now[0] += 20.1e-3  # a step's: 2 ms are for masks
    all_masks.prepare(sequences)
    assert [constraint_of(sequence).max_draft for sequence in sequences] == [5, 5]
    all_masks.close()
