"""Structured answers against Hugging Face's logits and listed languages, alone and concurrently."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.errors import InvalidInput
from server.engine.engine import Engine
from server.engine.guidance import Constraint, Guidance
from server.engine.request import GenerationRequest, Grammar, SamplingParams
from server.engine.scheduler import SchedulerLimits
from server.errors import NotReady
from server.model.base.weights import BaseModel
from tests.kits.engines import GREEDY, build_engine, check_idle, refs, run, token_bytes
from tests.kits.grammars import BOUNDED, CODES, guidance_of
from tests.kits.oracles.hugging_face import load_reference, logits, merged
from tests.server.engine.traffic import assert_same, library, prompt

EOS = 2
PLAIN = replace(GREEDY, ignore_eos=False, max_tokens=48)
SAMPLED = replace(PLAIN, temperature=1.0, seed=7)


@pytest.fixture(scope="module")
def guidance(tiny_base: BaseModel) -> Iterator[Guidance]:
    guidance = guidance_of(tiny_base.tokenizer, tiny_base.config.vocab_size, (EOS,))
    guidance.check(CODES.grammar)
    yield guidance
    guidance.close()


def structured(name: str, sampling: SamplingParams = PLAIN, **fields: Any) -> GenerationRequest:
    return replace(GenerationRequest(name, prompt(40), sampling, grammar=CODES.grammar), **fields)


@pytest.mark.parametrize("adapter", [None, "00"])
def test_greedy_answers_are_the_likeliest_that_match(
    tiny_base: BaseModel, tiny_base_dir: Path, guidance: Guidance, adapter: str | None
) -> None:
    adapters = library(tiny_base, 1)
    engine = build_engine(tiny_base, adapters, guidance=guidance)
    used = refs(**{adapter: 1.0}) if adapter else ()
    found = run(engine, [structured("a", adapters=used)])["a", 0]
    assert found.finish_reason == "stop"
    names, text = token_bytes(tiny_base.tokenizer), b""
    with merged(load_reference(tiny_base_dir), [(adapters["00"], 1.0)] if adapter else []) as model:
        rows = logits(model, [*prompt(40), *found.token_ids])[len(prompt(40)) - 1 :]
    for token_id, row, logprob in zip(found.token_ids, rows, found.logprobs, strict=False):
        allowed = sorted(CODES.allowed(text, names, tiny_base.config.vocab_size, (EOS,)))
        assert token_id in allowed
        assert CODES.is_forced(text) or token_id == allowed[int(row[allowed].argmax())]
        assert logprob == pytest.approx(float(row.log_softmax(-1)[token_id]), abs=1e-4)
        text += names.bytes_of(token_id)
    assert text in CODES.words
    assert found.text.encode() == text


def test_other_requests_do_not_change_structured_answers(tiny_base: BaseModel, guidance: Guidance) -> None:
    """Constrained and free sequences, greedy and sampled, with and without adapters, in one batch and alone."""
    adapters = library(tiny_base, 3)
    requests = []
    for number in range(12):
        used = refs(**{f"{number % 3:02}": 1.0}) if number % 4 else ()
        sampling = replace(SAMPLED if number % 2 else PLAIN, seed=number)
        request = structured(f"r{number}", sampling, adapters=used, n=1 + number % 2)
        requests.append(request if number % 3 else replace(request, grammar=None))
    together = run(build_engine(tiny_base, adapters, guidance=guidance), requests)
    for request in requests:
        alone = run(build_engine(tiny_base, adapters, guidance=guidance), [request])
        for key, result in alone.items():
            assert_same(together[key], result)
            if request.grammar and result.finish_reason == "stop":
                assert result.text.encode() in CODES.words
    assert any(result.finish_reason == "stop" for result in together.values())


def test_a_preempted_sequence_continues_its_grammar(tiny_base: BaseModel, guidance: Guidance) -> None:
    limits = SchedulerLimits(chunk_size=4, max_prefill_tokens=16)
    requests = [
        structured(
            f"r{number}", replace(SAMPLED, seed=number, max_tokens=30), prompt_token_ids=prompt(10, seed=number)
        )
        for number in range(6)
    ]
    tight = build_engine(tiny_base, num_blocks=12, block_size=4, limits=limits, guidance=guidance)
    found = run(tight, requests)
    assert tight.stats.preemptions
    check_idle(tight)
    roomy = run(build_engine(tiny_base, guidance=guidance), requests)
    for key, result in roomy.items():
        assert found[key].text == result.text
        assert result.text.encode() in CODES.words


def test_json_is_compact_and_valid(tiny_base: BaseModel, guidance: Guidance) -> None:
    requests = []
    for name, schema in BOUNDED.items():
        grammar = Grammar("json_schema", json.dumps(schema))
        guidance.check(grammar)
        requests.append(structured(name, replace(SAMPLED, max_tokens=300), grammar=grammar, n=3))
    results = run(build_engine(tiny_base, guidance=guidance, num_blocks=1024), requests)
    for (name, _), result in results.items():
        assert result.finish_reason == "stop", result
        document = json.loads(result.text)
        jsonschema.validate(document, BOUNDED[name])
        assert json.loads(json.dumps(document)) == document
        assert not result.text.endswith((" ", "\n"))


def test_an_answer_that_is_too_long_is_cut(tiny_base: BaseModel, guidance: Guidance) -> None:
    cut = run(build_engine(tiny_base, guidance=guidance), [structured("a", replace(PLAIN, max_tokens=2))])["a", 0]
    assert cut.finish_reason == "length"
    assert any(word.startswith(cut.text.encode()) for word in CODES.words)


def test_the_last_token_may_be_the_end(tiny_base: BaseModel, guidance: Guidance) -> None:
    """An answer that can't continue ends with "stop", even if it also reaches max_tokens."""
    grammar = Grammar("regex", "[a-d]{3}")
    guidance.check(grammar)
    request = structured("a", replace(SAMPLED, max_tokens=3), grammar=grammar)
    found = run(build_engine(tiny_base, guidance=guidance), [request])["a", 0]
    assert (found.finish_reason, len(found.text)) == ("stop", 3)


class Failing(Constraint):
    """A grammar that fails after a number of tokens."""

    is_complete = False
    awaits_mask = False
    lacks_mask = False
    max_draft = 1000

    def __init__(self, num_tokens: int, vocab_size: int) -> None:
        self._num_left = num_tokens
        self._vocab_size = vocab_size

    @property
    def error(self) -> InvalidInput | None:
        too_complex = InvalidInput.of("regex", "became too complex to follow: make it simpler")
        return None if self._num_left > 0 else too_complex

    def forbidden(self) -> NDArray[np.bool_] | None:
        return np.zeros(self._vocab_size, dtype=bool) if self._num_left > 0 else None

    def accept(self, token_id: int) -> None:
        self._num_left -= 1

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        return ()

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        return min(len(token_ids), self._num_left)

    def after(self, token_ids: Sequence[int]) -> "Failing":
        return Failing(self._num_left - len(token_ids), self._vocab_size)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])  # the request allows three
def test_a_too_complex_grammar_only_ends_its_request(
    tiny_base: BaseModel, guidance: Guidance, num_tokens: int
) -> None:
    """A grammar that fails during an answer fails its request with a reason. Others continue."""
    engine = build_engine(tiny_base, guidance=guidance)
    engine.add(structured("bad", replace(PLAIN, max_tokens=3, logit_bias=((EOS, -100.0),))))
    engine.add(structured("good"))
    (bad, good) = engine.scheduler.sequences()
    bad.constraint = Failing(num_tokens, tiny_base.config.vocab_size)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    ends = {output.request_id: output for output in outputs if output.finish_reason}
    assert ends["bad"].finish_reason == "abort"
    assert isinstance(ends["bad"].error, InvalidInput)
    assert ends["good"].finish_reason == "stop"
    assert good.num_output_tokens


def test_an_unchecked_grammar_is_refused(tiny_base: BaseModel, guidance: Guidance) -> None:
    unchecked = structured("a", grammar=Grammar("regex", "unchecked"))
    engines: list[Engine] = [build_engine(tiny_base), build_engine(tiny_base, guidance=guidance)]
    for engine in engines:
        with pytest.raises(NotReady):
            engine.check(unchecked)


def test_a_bias_for_an_unknown_token_is_refused(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base)
    size = tiny_base.config.vocab_size
    biased = replace(GREEDY, logit_bias=((size - 1, 1.0),))
    engine.check(GenerationRequest("a", (1,), biased))
    with pytest.raises(InvalidInput, match="logit_bias"):
        engine.check(GenerationRequest("a", (1,), replace(GREEDY, logit_bias=((size, 1.0),))))
