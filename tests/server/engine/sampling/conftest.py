"""Run tests of sampling on both samplers."""

import pytest

from server.engine import sampling
from tests.server.engine.sampling.samplers import Sample, native_sample


@pytest.fixture(scope="session", params=["torch", "native"])
def sample(request: pytest.FixtureRequest) -> Sample:
    return native_sample(num_threads=2) if request.param == "native" else sampling.sample
