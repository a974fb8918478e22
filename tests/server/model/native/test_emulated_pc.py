"""The kernels for x86-64 instructions that this machine lacks, on an emulated PC: the tests of test_kernels.py.

Without AMX: Bochs 3.0 has its instructions but not XFD, without which Linux doesn't enable them.
"""

from collections.abc import Mapping
from functools import cache

import pytest

from server.model.native.build import INSTRUCTIONS, NativeUnavailable
from server.model.native.library import instructions
from tests.server.model.native.build import build
from tests.server.model.native.pc.machine import PROCESSORS, Ended, emulate, missing
from tests.server.model.native.test_kernels import NAMES

SECONDS = 900.0
WRONG = {
    "avx512_bf16": (
        "scaled_weights_are_rounded_to_16_bits",
        "steps_over_stored_weights",
        "stored_weights_expand_to_the_same_bits",
    )
}
"""Wrong results of Bochs 3.0: its VCVTNE2PS2BF16 rounds the second operand for both halves."""
EMULATED = [
    (processor, name)
    for processor in PROCESSORS
    for name in NAMES
    # The tests of failing allocations take minutes and don't depend on instructions.
    if not name.endswith("_without_memory") and name not in WRONG.get(processor, ())
]

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}: see pc/machine.py"),
]


def _mark(processor: str, name: str) -> pytest.MarkDecorator:
    """Return the marks for the newest instructions: running everything takes minutes."""
    is_first = processor == "avx512_bf16" and any(word in name for word in ("loss", "product", "steps"))
    return pytest.mark.thorough if is_first else pytest.mark.slow


@cache
def _emulated(processor: str, names: tuple[str, ...]) -> Mapping[str, Ended]:
    program = build("-static", name=processor)
    return emulate(PROCESSORS[processor], program, names, timeout=SECONDS)


def _own() -> tuple[str, ...]:
    try:
        return INSTRUCTIONS[instructions()]
    except NativeUnavailable:
        return ()


@pytest.mark.parametrize(
    ("processor", "name"), [pytest.param(*emulated, marks=_mark(*emulated)) for emulated in EMULATED]
)
def test_kernels_on_an_emulated_pc(processor: str, name: str, request: pytest.FixtureRequest) -> None:
    """The first test for a processor runs all selected tests for it, on one machine."""
    if set(INSTRUCTIONS[processor]) <= set(_own()):
        pytest.skip("this machine has these instructions: test_kernels.py or test_lesser_processors.py runs them")
    own = (item for item in request.session.items if isinstance(item, pytest.Function))
    asked = [item.callspec.params for item in own if item.originalname == test_kernels_on_an_emulated_pc.__name__]
    names = tuple(params["name"] for params in asked if params["processor"] == processor)
    assert _emulated(processor, names)[name] == Ended(f"passed {name}\n", 0)
