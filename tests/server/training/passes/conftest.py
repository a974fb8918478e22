"""Fixtures of native passes: the library, and tiny bases that it supports."""

import ctypes

import pytest

from server.model.base.weights import BaseModel
from tests.kits.native import SHAPES, native_library, tiny_of


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return native_library()


@pytest.fixture(scope="module", params=list(SHAPES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return tiny_of(tmp_path_factory.mktemp("native"), request.param)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return tiny_of(tmp_path_factory.mktemp("native"), "grouped")
