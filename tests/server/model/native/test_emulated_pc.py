"""The kernels for instructions of x86-64 that this machine lacks, on an emulated PC: the tests of test_kernels.py.

AMX isn't among them: Bochs 3.0 has its instructions, but not XFD, without which Linux lets nobody use them.
"""

from collections.abc import Mapping

import pytest

from server.model.native.library import INSTRUCTIONS, NativeUnavailable, instructions
from tests.server.model.native.build import build
from tests.server.model.native.pc.machine import PROCESSORS, Ended, emulate, missing
from tests.server.model.native.test_kernels import NAMES

SECONDS = 1800.0
WRONG = {
    "avx512_bf16": (
        "scaled_weights_are_rounded_to_16_bits",
        "steps_over_stored_weights",
        "stored_weights_expand_to_the_same_bits",
    )
}
"""What Bochs 3.0 computes otherwise: its VCVTNE2PS2BF16 rounds the second operand for both halves."""
EMULATED = [
    (processor, name)
    for processor in PROCESSORS
    for name in NAMES
    # without memory each allocation fails in turn, which takes minutes and says nothing of instructions
    if not name.endswith("_without_memory") and name not in WRONG.get(processor, ())
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}: see pc/machine.py"),
]


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest) -> Mapping[str, Ended]:
    """What became of the tests that are asked for with a processor, all of which one machine runs."""
    processor: str = request.param
    if set(INSTRUCTIONS[processor]) <= set(_own()):
        pytest.skip("this machine has these instructions: test_kernels.py or test_lesser_processors.py runs them")
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_kernels_on_an_emulated_pc.__name__
        if item.callspec.params["ended"] == processor
    }
    return emulate(
        PROCESSORS[processor],
        build("-static", name=processor),
        [name for name in NAMES if name in asked],
        timeout=SECONDS,
    )


def _own() -> tuple[str, ...]:
    try:
        return INSTRUCTIONS[instructions()]
    except NativeUnavailable:
        return ()


@pytest.mark.parametrize(("ended", "name"), EMULATED, indirect=["ended"])
def test_kernels_on_an_emulated_pc(ended: Mapping[str, Ended], name: str) -> None:
    assert ended[name] == Ended(f"passed {name}\n", 0)
