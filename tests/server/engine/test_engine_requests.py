"""Single requests: prefixes, choices, stops, limits, log-probabilities, statistics and times."""

from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import InvalidInput
from adapters.lora import AdapterRef, LoraWeights
from server.engine.engine import Engine
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import SchedulerLimits
from server.engine.torch_backend import TorchBackend
from server.model.base.weights import BaseModel
from server.model.smollm import SmolLM
from tests.kits.engines import (
    GREEDY,
    build_engine,
    check_idle,
    refs,
    run,
    token_bytes,
)
from tests.kits.oracles.hugging_face import load_reference, logits
from tests.server.engine.traffic import SAMPLED, assert_same, library, prompt


def test_a_cached_prefix_is_reported_and_changes_nothing(tiny_base: BaseModel) -> None:
    adapters = library(tiny_base, 2)
    request = GenerationRequest("a", prompt(50), GREEDY, refs(**{"00": 1.0}))
    engine = build_engine(tiny_base, adapters)
    first = run(engine, [request])["a", 0]
    second = run(engine, [replace(request, request_id="b")])["b", 0]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 48)
    assert_same(second, first)
    other = run(engine, [replace(request, request_id="c", adapters=refs(**{"01": 1.0}))])["c", 0]
    assert other.num_cached_tokens == 0
    assert other.token_ids != first.token_ids
    weight = run(engine, [replace(request, request_id="d", adapters=refs(**{"00": 0.5}))])["d", 0]
    assert weight.num_cached_tokens == 0
    stats = engine.stats
    assert (stats.prompt_tokens, stats.prefix_cached_tokens) == (200, 48)
    assert stats.output_tokens == 4 * 16


@pytest.mark.parametrize("adapters", [{}, {"00": 1.0}])
def test_a_prefix_is_only_found_by_its_own_project(tiny_base: BaseModel, adapters: dict[str, float]) -> None:
    engine = build_engine(tiny_base, library(tiny_base, 1))
    request = GenerationRequest("a", prompt(50), GREEDY, refs(**adapters), project="x")
    first = run(engine, [request])["a", 0]
    for project, num_cached in (("y", 0), ("", 0), ("x", 48), ("y", 48)):
        found = run(engine, [replace(request, project=project)])["a", 0]
        assert found.num_cached_tokens == num_cached
        assert_same(found, first)


def test_a_sequence_does_not_wait_for_another_projects_prefix(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base, limits=SchedulerLimits(chunk_size=64))
    requests = [GenerationRequest(name, prompt(50), GREEDY, project=name) for name in "ab"]
    for one in requests:
        engine.add(one)
    engine.step()
    assert [sequence.request for sequence in engine.scheduler.running] == requests


def test_generated_tokens_are_cached(tiny_base: BaseModel) -> None:
    """The next turn of a conversation finds the last answer."""
    engine = build_engine(tiny_base)
    first = run(engine, [GenerationRequest("a", prompt(20), replace(GREEDY, max_tokens=30))])["a", 0]
    turn = (*prompt(20), *first.token_ids, *prompt(5, seed=1))
    found = run(engine, [GenerationRequest("b", turn, GREEDY)])["b", 0]
    assert found.num_cached_tokens == 48
    fresh = run(build_engine(tiny_base), [GenerationRequest("b", turn, GREEDY)])["b", 0]
    assert_same(found, fresh)


def test_prompts_are_counted_once_even_if_they_are_preempted(tiny_base: BaseModel) -> None:
    """The second is preempted during its prompt, and the first grows until it has evicted all blocks of the
    second."""
    limits = SchedulerLimits(chunk_size=4, max_prefill_tokens=4)
    engine = build_engine(tiny_base, num_blocks=14, block_size=4, limits=limits)
    lengths = {"a": (4, 52), "b": (40, 16)}
    run(
        engine,
        [GenerationRequest(k, prompt(n, seed=n), replace(GREEDY, max_tokens=m)) for k, (n, m) in lengths.items()],
    )
    assert engine.stats.preemptions == 1
    assert engine.stats.prompt_tokens == 44
    assert engine.stats.prefix_cached_tokens == 0
    assert engine.stats.output_tokens == 68


def test_choices_differ_and_do_not_depend_on_their_number(tiny_base: BaseModel) -> None:
    request = GenerationRequest("a", prompt(20), replace(SAMPLED, temperature=2.0), n=4)
    engine = build_engine(tiny_base)
    several = run(engine, [request])
    assert len({tuple(result.token_ids) for result in several.values()}) == 4
    one = run(engine, [replace(request, n=1)])
    assert_same(several["a", 0], one["a", 0])
    other_seed = run(engine, [replace(request, n=1, sampling=replace(request.sampling, seed=6))])
    assert other_seed["a", 0].token_ids != one["a", 0].token_ids


def test_logprobs_are_the_models(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    engine = build_engine(tiny_base)
    request = GenerationRequest(
        "a", prompt(20), replace(SAMPLED, logprobs=5, repetition_penalty=1.5, max_tokens=10)
    )
    engine.add(request)
    entries = []
    while engine.has_work:
        entries += [entry for output in engine.step() for entry in output.logprobs]
    ids = [*request.prompt_token_ids, *(entry.chosen.token_id for entry in entries)]
    expected = logits(load_reference(tiny_base_dir), ids).log_softmax(-1)[19:-1]
    decode = token_bytes(tiny_base.tokenizer)
    for entry, row in zip(entries, expected, strict=True):
        assert entry.chosen.logprob == pytest.approx(float(row[entry.chosen.token_id]), abs=1e-4)
        assert [token.token_id for token in entry.top] == row.topk(5).indices.tolist()
        for token in (entry.chosen, *entry.top):
            assert bytes(token.bytes) == decode.bytes_of(token.token_id)
            assert token.text == decode.name_of(token.token_id)


def greedy_tokens(base: BaseModel, ids: tuple[int, ...], num: int = 30) -> list[int]:
    return run(build_engine(base), [GenerationRequest("x", ids, replace(GREEDY, max_tokens=num))])[
        "x", 0
    ].token_ids


def test_an_answer_ends_before_a_stop_string(tiny_base: BaseModel) -> None:
    tokens = greedy_tokens(tiny_base, prompt(20))
    text = str(tiny_base.tokenizer.decode(tokens, skip_special_tokens=True))
    stop = text[12:15]
    assert text.index(stop) > 0
    engine = build_engine(tiny_base)
    sampling = replace(GREEDY, max_tokens=30, stop=("no such text", stop))
    found = run(engine, [GenerationRequest("a", prompt(20), sampling)])["a", 0]
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"
    assert found.token_ids == tokens[: len(found.token_ids)]
    assert stop in tiny_base.tokenizer.decode(found.token_ids, skip_special_tokens=True)
    assert stop not in tiny_base.tokenizer.decode(found.token_ids[:-1], skip_special_tokens=True)
    check_idle(engine)


def test_an_unfinished_stop_string_is_part_of_the_text(tiny_base: BaseModel) -> None:
    tokens = greedy_tokens(tiny_base, prompt(20))
    text = str(tiny_base.tokenizer.decode(tokens, skip_special_tokens=True))
    sampling = replace(GREEDY, max_tokens=30, stop=(text[-4:] + "!?",))
    found = run(build_engine(tiny_base), [GenerationRequest("a", prompt(20), sampling)])["a", 0]
    assert found.text == text
    assert found.finish_reason == "length"


def eos_base(base: BaseModel, *token_ids: int) -> BaseModel:
    return replace(base, config=replace(base.config, eos_token_ids=token_ids))


def test_the_end_token_ends_an_answer_and_adds_no_text(tiny_base: BaseModel) -> None:
    tokens = greedy_tokens(tiny_base, prompt(20))
    end = tokens[9]
    length = tokens.index(end) + 1
    base = eos_base(tiny_base, 511, end)
    sampling = replace(GREEDY, max_tokens=30, ignore_eos=False)
    found = run(build_engine(base), [GenerationRequest("a", prompt(20), sampling)])["a", 0]
    assert found.finish_reason == "stop"
    assert found.token_ids == tokens[:length]
    assert found.text == tiny_base.tokenizer.decode(tokens[: length - 1], skip_special_tokens=True)
    ignoring = run(build_engine(base), [GenerationRequest("a", prompt(20), replace(sampling, ignore_eos=True))])[
        "a", 0
    ]
    assert ignoring.token_ids == tokens
    assert ignoring.finish_reason == "length"


def test_one_token(tiny_base: BaseModel) -> None:
    found = run(build_engine(tiny_base), [GenerationRequest("a", (5,), replace(GREEDY, max_tokens=1))])["a", 0]
    assert len(found.token_ids) == 1
    assert found.finish_reason == "length"


@pytest.mark.parametrize(
    ("length", "max_tokens", "fits"),
    [(0, 5, False), (1, 63, True), (1, 64, False), (63, 1, True), (64, 1, False), (30, 34, True), (30, 35, False)],
)
def test_requests_that_can_never_run_are_refused(
    tiny_base: BaseModel, length: int, max_tokens: int, fits: bool
) -> None:
    for engine in (build_engine(tiny_base, max_model_len=64), build_engine(tiny_base, num_blocks=4)):
        request = GenerationRequest("a", prompt(length), replace(GREEDY, max_tokens=max_tokens))
        if fits:
            found = run(engine, [request])["a", 0]
            assert len(found.token_ids) == max_tokens
            check_idle(engine)
        else:
            with pytest.raises(InvalidInput) as caught:
                engine.check(request)
            assert caught.value.errors[0].loc == (("max_tokens" if length else "prompt"),)


def test_stats_count_what_happens(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base, library(tiny_base, 3), max_rank=16, limits=SchedulerLimits(max_num_seqs=2))
    assert (engine.stats.num_running, engine.stats.num_waiting, engine.stats.kv_blocks_total) == (0, 0, 256)
    for i in range(3):
        engine.add(GenerationRequest(str(i), prompt(20, seed=i), GREEDY))
    engine.step()
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.steps) == (2, 1, 1)
    assert stats.kv_blocks_used == 4
    while engine.has_work:
        engine.step()
    run(engine, [GenerationRequest("a", (1, 2), GREEDY, refs(**{name: 1.0})) for name in ("00", "01", "02")][:1])
    assert engine.stats.resident == {"00"}
    assert engine.stats.adapters_resident == 1
    assert engine.stats.adapter_rows_used == 7 * 1
    assert engine.stats.adapter_loads == 1


def test_timing_uses_the_engines_clock(tiny_base: BaseModel) -> None:
    now = [0.0]
    plain = build_engine(tiny_base, limits=SchedulerLimits(max_num_seqs=1))
    engine = Engine(
        TorchBackend(SmolLM(tiny_base.config, tiny_base.weights, max_positions=plain.config.max_model_len)),
        token_bytes(tiny_base.tokenizer),
        lambda digest: LoraWeights({}),
        plain.config,
        clock=lambda: now[0],
    )
    for name in "ab":
        engine.add(GenerationRequest(name, prompt(5), replace(GREEDY, max_tokens=3)))
    timings = {}
    while engine.has_work:
        for output in engine.step():
            if output.timing is not None:
                timings[output.request_id] = output.timing
        now[0] += 1.0
    assert (timings["a"].queue, timings["a"].first_token, timings["a"].total) == (0.0, 0.0, 2.0)
    assert (timings["b"].queue, timings["b"].first_token, timings["b"].total) == (3.0, 3.0, 5.0)


def test_requests_are_picklable() -> None:
    import pickle

    request = GenerationRequest("a", (1, 2), SamplingParams(stop=("x",)), (AdapterRef("d", -1.0),), 3)
    assert pickle.loads(pickle.dumps(request)) == request
