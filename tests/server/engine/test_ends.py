"""The ends of answers: minimum lengths, further end tokens, and stop strings in the first tokens."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from adapters.errors import InvalidInput
from server.engine.request import GenerationRequest, SamplingParams
from server.model.base.weights import BaseModel
from tests.kits.engines import GREEDY, Result, build_engine, run, token_bytes
from tests.server.engine.traffic import prompt

PROMPT = prompt(30, seed=5)
SAMPLED = replace(GREEDY, temperature=1.0, seed=3, ignore_eos=False)


def answer(base: BaseModel, sampling: SamplingParams, prompt_token_ids: Sequence[int] = PROMPT) -> Result:
    request = GenerationRequest("a", tuple(prompt_token_ids), sampling)
    engine = build_engine(base)
    engine.check(request)
    return run(engine, [request])["a", 0]


def test_an_end_token_waits_for_the_minimum_length(tiny_base: BaseModel) -> None:
    (eos, *_) = tiny_base.config.eos_token_ids
    wants_to_end = replace(SAMPLED, logit_bias=((eos, 100.0),))
    assert answer(tiny_base, wants_to_end).token_ids == [eos]
    found = answer(tiny_base, replace(wants_to_end, min_tokens=4))
    assert len(found.token_ids) == 5
    assert (found.token_ids[-1], found.finish_reason) == (eos, "stop")
    assert not set(found.token_ids[:-1]) & set(tiny_base.config.eos_token_ids)
    # an end token that is ignored ends nothing, so it may come early
    ignored = replace(wants_to_end, ignore_eos=True, min_tokens=4, max_tokens=6)
    assert answer(tiny_base, ignored).token_ids == [eos] * 6


def test_further_end_tokens(tiny_base: BaseModel) -> None:
    """They end an answer even if `ignore_eos` is set. Their text belongs to the answer."""
    whole = answer(tiny_base, replace(GREEDY, temperature=1.0, seed=1)).token_ids
    last = whole[4]
    end = whole.index(last) + 1
    found = answer(tiny_base, replace(GREEDY, temperature=1.0, seed=1, stop_token_ids=(last,)))
    assert (found.token_ids, found.finish_reason) == (whole[:end], "stop")
    contents = b"".join(map(token_bytes(tiny_base.tokenizer).bytes_of, whole[:end]))
    assert found.text == contents.decode(errors="replace")
    later = answer(tiny_base, replace(GREEDY, temperature=1.0, seed=1, stop_token_ids=(last,), min_tokens=end))
    assert later.token_ids[: end - 1] == whole[: end - 1]
    assert last not in later.token_ids[:end]


def test_end_tokens_beyond_the_vocabulary_are_refused(tiny_base: BaseModel) -> None:
    with pytest.raises(InvalidInput) as caught:
        answer(tiny_base, replace(GREEDY, stop_token_ids=(tiny_base.config.vocab_size,)))
    assert [fault.loc for fault in caught.value.errors] == [("stop_token_ids",)]


def test_stop_strings_wait_for_the_minimum_length(tiny_base: BaseModel) -> None:
    whole = answer(tiny_base, replace(GREEDY, temperature=1.0, seed=2, max_tokens=12))
    stop = whole.text[3]
    stopped = answer(tiny_base, replace(GREEDY, temperature=1.0, seed=2, max_tokens=12, stop=(stop,)))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert len(stopped.token_ids) < 6
    found = answer(tiny_base, replace(GREEDY, temperature=1.0, seed=2, max_tokens=12, stop=(stop,), min_tokens=6))
    assert found.token_ids[:6] == whole.token_ids[:6]
