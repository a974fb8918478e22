"""Drafts change no bit on the real base, whose answers repeat parts of their prompts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.engine.guidance import Constraint, Guidance
from server.engine.request import GenerationRequest, Grammar, SamplingParams
from server.model.base.weights import BaseModel, load_base
from server.model.native.model import NativeModel
from server.model.text.chat import ChatMessage, PromptEncoder
from tests.kits.engines import build_engine, check_idle, random_adapter, refs
from tests.kits.grammars import guidance_of
from tests.kits.native import native_model
from tests.server.engine.speculation.drafting import check_identity, drafting

pytestmark = pytest.mark.real

TEXT = (
    "The harbour lies where the river meets the ocean. Its shipyards built the caravels that sailed along the"
    " coast of Africa, and merchants kept houses near the water, where they traded salt, cork and wine for cloth."
)
GREEDY = SamplingParams(max_tokens=32, temperature=0.0)
SCHEMA = {
    "type": "object",
    "properties": {"places": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 6}},
    "required": ["places"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
WORDS = Grammar("regex", "(The|the)( [a-z]{1,12}){10,20}\\.")


@dataclass(frozen=True)
class Bench:
    base: BaseModel
    native: NativeModel
    guidance: Guidance

    def engine(self) -> Engine:
        shape = self.base.config.shape
        adapters = {name: random_adapter(shape, seed, strength=0.02) for seed, name in enumerate("ab")}
        return build_engine(self.base, adapters, native=self.native, guidance=self.guidance)

    def requests(self) -> list[GenerationRequest]:
        encoder = PromptEncoder(self.base.tokenizer)

        def asked(what: str) -> tuple[int, ...]:
            return tuple(encoder.messages([ChatMessage("user", f"{what}\n\n{TEXT}")]))

        copy, places = asked("Repeat this text word for word:"), asked("List the places as JSON:")
        warm = replace(GREEDY, temperature=0.4, top_p=0.95, seed=11)
        a, both = refs(a=1.0), refs(a=0.6, b=-0.4)
        return [
            GenerationRequest("greedy", copy, GREEDY),
            GenerationRequest("scored", copy, replace(warm, logprobs=5, min_p=0.02)),
            GenerationRequest("choices", copy, warm, n=2),
            GenerationRequest("adapter", copy, replace(warm, ignore_eos=True), a),
            GenerationRequest("blend", copy, GREEDY, both),
            GenerationRequest("repetition", copy, replace(GREEDY, repetition_penalty=1.05)),
            GenerationRequest("frequency", copy, replace(warm, frequency_penalty=0.05, presence_penalty=0.1)),
            GenerationRequest("stop", copy, replace(GREEDY, stop=("that sailed", " coast"))),
            GenerationRequest("json", places, replace(warm, max_tokens=80), grammar=JSON),
            GenerationRequest("json of an adapter", places, replace(GREEDY, max_tokens=80), a, grammar=JSON),
            GenerationRequest("words", copy, GREEDY, grammar=WORDS),
        ]


@pytest.fixture(scope="module")
def bench(base_dir: Path) -> Iterator[Bench]:
    base = load_base(base_dir)
    guidance = guidance_of(base.tokenizer, base.config.vocab_size, base.config.eos_token_ids)
    for grammar in (JSON, WORDS):
        guidance.check(grammar)
    yield Bench(base, native_model(base), guidance)
    guidance.close()


@pytest.mark.thorough  # sequentially below; in a batch on a tiny base in test_identity.py
def test_together(bench: Bench) -> None:
    engine = drafting(bench.engine())
    results = check_identity(bench.engine(), engine, bench.requests())
    assert results["stop", 0].finish_reason == "stop"
    assert json.loads(results["json", 0].text)["places"]
    assert engine.stats.accepted_tokens > 100
    check_idle(engine)


@pytest.mark.thorough  # over HTTP: end_to_end/test_native_parity.py
def test_one_after_the_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request gets accepted drafts, and continues from blocks computed with another's drafts.

    Masks count as free: on a busy machine their measured time would shorten the drafts.
    """
    monkeypatch.setattr(Constraint, "max_draft", 1000)
    plain, engine = bench.engine(), drafting(bench.engine())
    for request in bench.requests()[::2]:
        num_accepted = engine.stats.accepted_tokens
        check_identity(plain, engine, [request])
        assert engine.stats.accepted_tokens > num_accepted + 5, request.request_id
    assert engine.stats.prefix_cached_tokens == plain.stats.prefix_cached_tokens > 0
