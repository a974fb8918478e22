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
EMULATED = [name for name in NAMES if not name.endswith("_without_memory")]
"""All but those that let each allocation fail in turn: these take minutes, and say nothing of instructions."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}: see pc/machine.py"),
]


@pytest.fixture(scope="module", params=PROCESSORS)
def ended(request: pytest.FixtureRequest) -> Mapping[str, Ended]:
    """What became of the kernels' tests that are asked for, all of which one machine runs."""
    name: str = request.param
    if set(INSTRUCTIONS[name]) <= set(_own()):
        pytest.skip("this machine has these instructions: test_kernels.py or test_lesser_processors.py runs them")
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test_emulated_kernels.__name__
    }
    program = build("-static", name=name)
    return emulate(PROCESSORS[name], program, [each for each in EMULATED if each in asked], timeout=SECONDS)


def _own() -> tuple[str, ...]:
    try:
        return INSTRUCTIONS[instructions()]
    except NativeUnavailable:
        return ()


@pytest.mark.parametrize("name", EMULATED)
def test_emulated_kernels(ended: Mapping[str, Ended], name: str) -> None:
    assert ended[name] == Ended(f"passed {name}\n", 0)
