"""Several continuations of one prompt, scored together as if each followed the prompt alone."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import InvalidInput
from adapters.lora import AdapterRef
from server.engine.continuations import TokenTrie
from server.engine.engine import Engine
from server.engine.request import GenerationRequest, SamplingParams, SequenceOutput
from server.engine.runner import Drawn
from server.engine.scheduler import SchedulerLimits
from server.engine.sequence import Chunk
from server.model.base.weights import BaseModel
from tests.kits.engines import GREEDY, build_engine, check_idle, refs, run
from tests.server.engine.sampling.test_scoring import reference
from tests.server.engine.traffic import assert_same, library, prompt

SCORING = SamplingParams(max_tokens=0, temperature=0.0)
Continuations = tuple[tuple[int, ...], ...]

ONE_TOKEN = ((7,), (8,), (9,))
MANY_TOKENS = ((7, 8, 9, 2), (10, 11, 2))
PREFIXES = ((7, 2), (7, 8, 2), (7, 8, 9, 2), (7, 8), (7,))
SHARED = ((7, 8, 9, 2), (7, 8, 10, 2), (7, 11, 2), (12, 2))
EQUAL = ((7, 2), (7, 2))
MANY = tuple((20 + n // 16, 20 + n % 16, 2) for n in range(255))
SETS = [ONE_TOKEN, MANY_TOKENS, PREFIXES, SHARED, EQUAL, MANY]


def asking(
    name: str, num_tokens: int, continuations: Continuations, adapters: tuple[AdapterRef, ...] = (), seed: int = 0
) -> GenerationRequest:
    return GenerationRequest(
        *(name, prompt(num_tokens, seed), SCORING, adapters),
        scored_from=num_tokens,
        continuations=continuations,
    )


def answers(engine: Engine, requests: Sequence[GenerationRequest]) -> dict[str, SequenceOutput]:
    for request in requests:
        engine.check(request)
        engine.add(request)
    found: dict[str, SequenceOutput] = {}
    while engine.has_work:
        found |= {output.request_id: output for output in engine.step() if output.finish_reason}
    check_idle(engine)
    return found


def apart(request: GenerationRequest) -> list[GenerationRequest]:
    """Return one request for each continuation, which scores it as the end of a longer prompt."""
    prompt_ids = request.prompt_token_ids
    return [
        replace(
            request,
            request_id=f"{request.request_id}-{number}",
            prompt_token_ids=prompt_ids + one,
            continuations=(),
            scored_from=len(prompt_ids),
        )
        for number, one in enumerate(request.continuations)
    ]


def test_scores_are_hugging_faces(tiny_base: BaseModel, tiny_base_dir: Path) -> None:
    adapters = library(tiny_base, 2)
    blend = refs(**{"00": 0.5, "01": 0.7})
    requests = [
        asking(f"{length}-{number}-{bool(used)}", length, continuations, used, seed=length)
        for number, continuations in enumerate(SETS[:-1])
        for length in (1, 15, 16, 63, 100)
        for used in ((), blend)
    ]
    found = answers(build_engine(tiny_base, adapters), requests)
    for request in requests:
        expected = [sum(reference(tiny_base_dir, one, adapters)) for one in apart(request)]
        assert found[request.request_id].scores == pytest.approx(expected, abs=2e-4)


def test_255_continuations_equal_255_requests(tiny_base: BaseModel) -> None:
    request = asking("many", 40, MANY)
    engine = build_engine(tiny_base)
    (together,) = answers(engine, [request]).values()
    single = answers(build_engine(tiny_base), apart(request))
    expected = [sum(single[one.request_id].scores) for one in apart(request)]
    assert together.scores == pytest.approx(expected, abs=1e-4)
    assert together.num_new_tokens == 16 + 255 + 255


def test_shared_tokens_are_computed_once(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step computes what the last one lacks, and no continuation's last token is computed."""
    engine = build_engine(tiny_base)
    computed: list[int] = []
    run_chunks = engine.runner.run

    def recording(chunks: Sequence[Chunk]) -> list[Drawn]:
        computed.extend(token_id for chunk in chunks for token_id in chunk.token_ids)
        return run_chunks(chunks)

    monkeypatch.setattr(engine.runner, "run", recording)
    answers(engine, [asking("s", 20, SHARED)])
    assert computed[:20] == list(prompt(20, 0))
    assert sorted(computed[20:]) == [7, 8, 9, 10, 11, 12]


def test_the_prefix_cache_is_used_and_filled_and_never_keeps_a_continuation(tiny_base: BaseModel) -> None:
    """The blocks of continuations are overwritten, so only the prompt's blocks may be found."""
    long = tuple(range(30, 70))
    continuations = ((*long, 2), (*reversed(long), 2))
    engine = build_engine(tiny_base)
    request = asking("a", 40, continuations)
    (first,) = answers(engine, [request]).values()
    (second,) = answers(engine, [replace(request, request_id="b")]).values()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert second.scores == pytest.approx(first.scores, abs=1e-4)
    for number, path in enumerate((long, tuple(reversed(long)))):
        generating = GenerationRequest(f"g{number}", prompt(40) + path, replace(GREEDY, max_tokens=4))
        found = run(engine, [generating])[f"g{number}", 0]
        assert found.num_cached_tokens == 32
        assert_same(found, run(build_engine(tiny_base), [generating])[f"g{number}", 0])


def test_scores_survive_preemption(tiny_base: BaseModel) -> None:
    limits = SchedulerLimits(chunk_size=4, max_prefill_tokens=8)
    tight = build_engine(tiny_base, num_blocks=17, block_size=4, limits=limits)
    for n in range(2):
        tight.add(GenerationRequest(f"g{n}", prompt(4, seed=n), replace(GREEDY, max_tokens=30)))
    request = asking("s", 36, tuple((*range(n, n + 6), 2) for n in range(30, 60)), seed=9)
    tight.add(request)
    found: tuple[float, ...] = ()
    while tight.has_work:
        for output in tight.step():
            found += output.scores
    check_idle(tight)
    assert tight.stats.preemptions
    (expected,) = answers(build_engine(tiny_base), [request]).values()
    assert found == pytest.approx(expected.scores, abs=1e-4)


def test_an_aborted_request_frees_everything(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base)
    engine.add(asking("s", 40, MANY))
    for _ in range(3):
        engine.step()
    assert engine.stats.kv_blocks_used
    engine.abort("s")
    assert not engine.has_work
    check_idle(engine)


def test_a_continuation_that_does_not_fit_is_refused(tiny_base: BaseModel) -> None:
    engine = build_engine(tiny_base, num_blocks=4)
    fits = asking("fits", 60, (tuple(range(30, 35)),))
    (found,) = answers(engine, [fits]).values()
    assert len(found.scores) == 1
    with pytest.raises(InvalidInput, match="exceed 64"):
        engine.check(asking("long", 60, (tuple(range(30, 36)), (7,))))


@pytest.mark.parametrize("seed", range(20))
def test_a_trie_visits_each_path_once_and_backs_up_as_little_as_possible(seed: int) -> None:
    rng = random.Random(seed)
    continuations = [
        tuple(rng.randrange(3) for _ in range(rng.randint(1, 5))) for _ in range(rng.choice([1, 2, 5, 40]))
    ]
    trie = TokenTrie(continuations)
    computed: list[tuple[int, ...]] = [()]  # the tokens up to each computed one
    num_shared: int | None = 0
    while num_shared is not None:
        for num in range(num_shared, len(trie.path) + 1):
            if num > num_shared:
                computed.append(trie.path[:num])
            trie.record(num, [hash((*trie.path[:num], target)) % 97 for target in trie.targets(num)])
        num_shared = trie.advance()
    interior = {one[:length] for one in continuations for length in range(len(one))}
    assert sorted(computed) == sorted(interior)
    expected = [sum(hash(one[:length]) % 97 for length in range(1, len(one) + 1)) for one in continuations]
    assert trie.scores() == tuple(map(float, expected))
    assert trie.num_tokens == len({one[:length] for one in continuations for length in range(1, len(one) + 1)})
