"""Drafts change no bit of tokens, log-probabilities, texts and ends, on a tiny base."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.lora import LoraWeights
from server.engine.engine import Engine
from server.engine.guidance import Guidance
from server.engine.request import GenerationRequest, Grammar, SamplingParams
from server.engine.scheduler import SchedulerLimits
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.native.model import NativeModel
from tests.kits.engines import GREEDY, Results, build_engine, check_idle, random_adapter, refs, run
from tests.kits.grammars import guidance_of
from tests.kits.native import native_model
from tests.kits.properties import num_examples
from tests.kits.tiny import save_tiny_base
from tests.server.engine.speculation.drafting import TimedRunner, check_identity, drafting, without

EOS = 2
BLENDS: tuple[dict[str, float], ...] = ({}, {"a": 1.0}, {"a": 0.7, "b": -0.3})
SAMPLINGS: tuple[SamplingParams, ...] = (
    GREEDY,
    replace(GREEDY, logprobs=4, ignore_eos=False),
    replace(GREEDY, temperature=0.3, top_p=0.9, seed=3, ignore_eos=False),
    replace(GREEDY, temperature=0.2, top_k=5, min_p=0.01, seed=4),
    replace(GREEDY, repetition_penalty=1.02),
    replace(GREEDY, presence_penalty=0.01, frequency_penalty=0.002, logit_bias=((7, 1.5), (9, -2.0))),
)


@dataclass(frozen=True)
class Bench:
    base: BaseModel
    native: NativeModel
    adapters: dict[str, LoraWeights]
    guidance: Guidance

    def engine(self, num_blocks: int = 400, **limits: int) -> Engine:
        return build_engine(
            self.base,
            self.adapters,
            native=self.native,
            num_blocks=num_blocks,
            limits=SchedulerLimits(**limits),
            guidance=self.guidance,
        )

    def check(self, requests: list[GenerationRequest], **options: int) -> tuple[Engine, Results]:
        """Return an engine that drafted for the requests with some success, and its results."""
        engine = drafting(self.engine(**options))
        results = check_identity(self.engine(**options), engine, requests)
        assert engine.stats.accepted_tokens > 0
        check_idle(engine)
        return engine, results


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    directory = save_tiny_base(tmp_path_factory.mktemp("speculation") / "tiny", options=sizes, seed=4)
    base = load_base(resolve_base(str(directory), directory.parent), torch.bfloat16)
    adapters = {
        name: random_adapter(base.config.shape, seed, rank=rank, strength=0.3)
        for seed, (name, rank) in enumerate({"a": 16, "b": 3}.items())
    }
    guidance = guidance_of(base.tokenizer, base.config.vocab_size, (EOS,))
    yield Bench(base, native_model(base), adapters, guidance)
    guidance.close()


def repeating(length: int, period: int, seed: int = 0) -> tuple[int, ...]:
    """Return a prompt that repeats itself."""
    phrase = random.Random(seed).choices(range(100, 500), k=period)
    return tuple(phrase[i % period] for i in range(length))


def requests_of_all_kinds(max_tokens: int = 60) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"{blend}-{number}",
            repeating(20 + 11 * number, 3 + number, seed=blend),
            replace(sampling, max_tokens=max_tokens),
            refs(**BLENDS[blend]),
            n=2 if number == 2 else 1,
        )
        for blend in range(len(BLENDS))
        for number, sampling in enumerate(SAMPLINGS)
    ]


def test_drafts_change_no_answer_in_a_batch(bench: Bench) -> None:
    bench.check(requests_of_all_kinds(), max_num_seqs=64)


def test_drafts_change_no_answer_alone(bench: Bench) -> None:
    for request in requests_of_all_kinds():
        engine = drafting(bench.engine())
        check_identity(bench.engine(), engine, [request])
        check_idle(engine)


def test_drafts_with_few_blocks_and_preemptions(bench: Bench) -> None:
    num_preemptions = num_accepted = 0
    for num_blocks in (18, 24, 30):
        engine = drafting(bench.engine(num_blocks=num_blocks))
        check_identity(bench.engine(), engine, requests_of_all_kinds())
        check_idle(engine)
        num_preemptions += engine.stats.preemptions
        num_accepted += engine.stats.accepted_tokens
    assert num_preemptions > 0
    assert num_accepted > 0


@pytest.mark.parametrize(("period", "seed"), [(3, 1), (5, 3)])  # answers that soon repeat themselves
def test_stop_strings_and_limits_inside_a_draft(bench: Bench, period: int, seed: int) -> None:
    """Wherever the answer is cut, text, tokens, reason and cached blocks are the same."""
    request = GenerationRequest("a", repeating(60, period, seed), replace(GREEDY, max_tokens=60))
    whole = run(bench.engine(), without([request]))["a", 0].text
    num_accepted = 0
    for cut in range(1, 40, 4):  # some of these are ends of blocks
        at_stop = replace(GREEDY, max_tokens=60, stop=(whole[cut : cut + 3], "never"))
        for sampling in (at_stop, replace(GREEDY, max_tokens=cut)):
            plain, engine = bench.engine(), drafting(bench.engine())
            result = check_identity(plain, engine, [replace(request, sampling=sampling)])["a", 0]
            assert result.finish_reason == ("stop" if sampling.stop else "length")
            assert set(engine.blocks.cached_keys()) == set(plain.blocks.cached_keys())
            check_idle(engine)
            num_accepted += engine.stats.accepted_tokens
    assert num_accepted > 50


def test_the_prefix_cache_knows_the_same_blocks(bench: Bench) -> None:
    """Rejected drafts register no block, and accepted ones all, with the content of plain decoding."""
    num_drafted = num_accepted = 0
    for seed in range(4):
        sampling = replace(GREEDY, temperature=(0.3, 0.7)[seed % 2], max_tokens=100, seed=seed)
        request = GenerationRequest("a", repeating(40, 4 + seed, seed), sampling)
        plain, engine = bench.engine(), drafting(bench.engine())
        answer = check_identity(plain, engine, [request])["a", 0]
        num_drafted += engine.stats.drafted_tokens
        num_accepted += engine.stats.accepted_tokens
        assert set(engine.blocks.cached_keys()) == set(plain.blocks.cached_keys())
        turn = replace(request, prompt_token_ids=(*request.prompt_token_ids, *answer.token_ids, 7, 8, 9))
        second = run(engine, without([turn]))["a", 0]
        num_known = len(request.prompt_token_ids) + len(answer.token_ids) - 1
        assert second.num_cached_tokens == num_known // 16 * 16
        fresh = run(bench.engine(), without([turn]))["a", 0]
        assert replace(second, num_cached_tokens=0) == replace(fresh, num_cached_tokens=0)
    assert num_drafted - num_accepted > num_accepted / 10 > 1


GRAMMARS = (
    Grammar("regex", "(ab|cd)(ab|cd|, ){20}x?"),
    Grammar("regex", "([a-z]{1,6} ){12}"),
    Grammar("json_schema", '{"type":"array","items":{"enum":["left","right","up"]},"minItems":4,"maxItems":12}'),
)


def test_drafts_change_no_answer_under_a_grammar(bench: Bench) -> None:
    requests = []
    for number, grammar in enumerate(GRAMMARS):
        bench.guidance.check(grammar)
        for seed in range(4):
            sampling = replace(
                GREEDY, temperature=0.5 * seed, seed=seed, max_tokens=(80, 25)[seed % 2], ignore_eos=False
            )
            requests.append(
                GenerationRequest(
                    f"{number}-{seed}", repeating(30, 5), sampling, refs(**BLENDS[seed % 3]), grammar=grammar
                )
            )
    _, results = bench.check(requests, max_num_seqs=64)
    assert {result.finish_reason for result in results.values()} == {"stop", "length"}


def test_forced_tokens_take_no_steps(bench: Bench) -> None:
    """An answer that is mostly keys and brackets gets several tokens per step, and the same tokens, for any
    prompt."""
    schema = {"type": "object", "properties": {name: {"type": "boolean"} for name in ("first", "second", "third")}}
    grammar = Grammar("json_schema", json.dumps({**schema, "required": [*schema["properties"]]}))
    bench.guidance.check(grammar)
    request = GenerationRequest("a", tuple(range(40, 70)), replace(GREEDY, max_tokens=80), grammar=grammar)
    plain, engine = bench.engine(), bench.engine()
    for cost in (0.0, 0.9):
        drafting(engine, cost)
        result = check_identity(plain, engine, [request])["a", 0]
        assert set(json.loads(result.text)) == {"first", "second", "third"}
        assert engine.stats.drafted_tokens >= engine.stats.accepted_tokens > len(result.token_ids) / 3
    assert engine.stats.steps < plain.stats.steps / 2


def test_a_request_can_opt_out_of_drafts(bench: Bench) -> None:
    request = GenerationRequest("a", repeating(60, 5), replace(GREEDY, max_tokens=40))
    engine = drafting(bench.engine())
    run(engine, without([request]))
    assert engine.stats.drafted_tokens == 0
    assert engine.stats.steps == 1 + 39
    run(engine, [request])
    assert engine.stats.drafted_tokens >= engine.stats.accepted_tokens > 0
    assert engine.stats.steps < 2 * 40


def test_no_tokens_are_drafted_if_rows_are_expensive(bench: Bench) -> None:
    engine = drafting(bench.engine(), cost=1.0)
    check_identity(bench.engine(), engine, requests_of_all_kinds(30))
    assert engine.stats.drafted_tokens == 0


@pytest.mark.parametrize(("cost", "most"), [(0.01, 0.75), (0.1, 0.9), (1.0, 1.03)])
def test_the_measured_cost_of_a_row_decides(bench: Bench, cost: float, most: float) -> None:
    """Drafts save time by the engine's clock, or lose little if each takes as long as a step."""
    requests, took = requests_of_all_kinds(100), []
    for wanted in (without(requests), requests):
        engine = bench.engine()
        engine.runner = runner = TimedRunner(engine.runner, cost)
        engine._clock = partial(getattr, runner, "now")
        for request in wanted:
            run(engine, [request])
        took.append(runner.now)
    assert took[1] < most * took[0]


def test_the_torch_backend_does_not_draft(bench: Bench) -> None:
    """Its products round differently for one row than for several."""
    engine = drafting(build_engine(bench.base))
    run(engine, [GenerationRequest("a", repeating(60, 5), GREEDY)])
    assert engine.stats.drafted_tokens == 0


@settings(max_examples=num_examples(25), deadline=None)
@given(data=st.data())
def test_random_requests_with_drafts(bench: Bench, data: st.DataObject) -> None:
    """Hypothesis chooses prompts of few words, samplings, costs and limits."""
    draw = data.draw
    requests = []
    for number in range(draw(st.integers(1, 4))):
        words = draw(st.lists(st.integers(100, 500), min_size=1, max_size=4))
        prompt = draw(st.lists(st.sampled_from(words), min_size=1, max_size=40))
        sampling = SamplingParams(
            max_tokens=draw(st.integers(1, 40)),
            temperature=draw(st.sampled_from([0.0, 0.2, 1.0])),
            top_p=draw(st.sampled_from([1.0, 0.8])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.05])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.01])),
            seed=draw(st.integers(0, 9)),
            logprobs=draw(st.sampled_from([1, 3])),
            ignore_eos=draw(st.booleans()),
            logit_bias=draw(st.sampled_from([(), ((EOS, 2.0),)])),
        )
        adapters = refs(**draw(st.sampled_from(BLENDS)))
        requests.append(
            GenerationRequest(str(number), tuple(prompt), sampling, adapters, n=draw(st.integers(1, 2)))
        )
    limits = {"max_num_seqs": draw(st.integers(1, 20)), "num_blocks": draw(st.integers(12, 40))}
    engine = drafting(bench.engine(**limits), cost=draw(st.sampled_from([0.0, 0.1, 0.3])))
    check_identity(bench.engine(**limits), engine, requests)
    check_idle(engine)
