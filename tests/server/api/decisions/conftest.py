"""The app with a longer context, since a decision's prompt has its own words besides the input."""

from dataclasses import replace

import pytest

from server.api.deps import Services
from tests.server.conftest import MAX_POSITIONS, MakeServices


@pytest.fixture
def make_services(make_services: MakeServices) -> MakeServices:
    def make(**given: object) -> Services:
        return replace(make_services(**given), max_model_len=MAX_POSITIONS)

    return make
