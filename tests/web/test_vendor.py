"""Vendored files equal those of their packages, except for declared changes; generated types are current."""

import hashlib
import json

import pytest

from tests.web import api_types
from tests.web.vendor import MANIFEST, PACKAGES, VENDOR, adapted, manifest, sources

_DECLARATIONS = {"preact.d.mts", "hooks.d.mts", "htm.d.mts", "uplot.d.mts"}
"""Types, used only by `make check`."""


def test_the_manifest_names_each_file() -> None:
    stored = json.loads((VENDOR / MANIFEST).read_text())
    found = {path.name for path in VENDOR.iterdir()}
    assert found == set(stored) | _DECLARATIONS | {MANIFEST}
    for name, entry in stored.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == entry["sha256"], name


@pytest.mark.skipif(not PACKAGES.exists(), reason="`make check` installs the packages")
def test_the_files_are_the_packages() -> None:
    originals = sources()
    assert json.loads((VENDOR / MANIFEST).read_text()) == manifest(originals)
    for name, original in originals.items():
        assert (VENDOR / name).read_bytes() == adapted(name, original), name


def test_types_of_answers_are_those_of_the_api() -> None:
    assert api_types.FILE.read_text("utf-8") == api_types.written(), "run python -m tests.web.api_types"
