"""The targets of `make attack` with inputs near their seeds, made by Hypothesis: no finding."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kits.properties import num_examples
from tests.stress.fuzzing.bounds import Meter
from tests.stress.fuzzing.target import OPEN, SHARES, load

GOOD = {
    "expressions": {"read"},
    "adapter_bytes": {"read"},
    "adapter_parts": {"read"},
    "archives": {"read"},
    "row_files": {"jsonl read", "csv read"},
    "forms": {"200", "201"},
    "documents": {"200", "201", "204"},
    "headers": {"200"},
    "grammars": {"followed"},
}
"""Outcomes of some seeds; inputs near these seeds get far."""


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    OPEN.close()


@pytest.mark.parametrize("name", SHARES)
def test_seeds_get_far(name: str) -> None:
    target = load(name)
    meter = Meter(target)
    seeds = target.seeds()
    assert max(map(len, seeds)) <= target.max_len
    outcomes = {meter.run(seed)[0] for seed in seeds}
    assert outcomes >= GOOD[name]
    assert outcomes - GOOD[name] or name == "expressions"


# If a form ends inside a part, Starlette leaves that part's file for Python to close, which happens at once.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:Unclosed file:ResourceWarning"
)
@pytest.mark.hypothesis
@pytest.mark.parametrize("name", SHARES)
def test_no_input_is_a_finding(name: str) -> None:
    target = load(name)
    meter = Meter(target)

    @settings(max_examples=num_examples(60), deadline=None, suppress_health_check=list(HealthCheck))
    @given(near(target.seeds(), [*target.words, b"\xff", b"\0"]))
    def check(data: bytes) -> None:
        meter.run(data)

    check()


def near(seeds: Sequence[bytes], words: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Generate seeds with some bytes changed, tokens inserted or a part removed; or any bytes."""
    edits = st.tuples(st.integers(0, 1 << 14), st.integers(0, 6), st.sampled_from(words) | st.binary(max_size=6))
    return st.binary(max_size=200) | st.builds(_edited, st.sampled_from(seeds), st.lists(edits, max_size=4))


def _edited(seed: bytes, edits: Sequence[tuple[int, int, bytes]]) -> bytes:
    for place, num_dropped, put in edits:
        at = place % (len(seed) + 1)
        seed = seed[:at] + put + seed[at + num_dropped :]
    return seed
