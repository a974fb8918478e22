"""Sixty adapters with room for a few. `python -m tests.stress.many_adapters` uses a thousand."""

from pathlib import Path

import pytest

from tests.stress.many_adapters import measure


@pytest.mark.parametrize("pool", [4, 12])
def test_sixty_adapters(tmp_path: Path, pool: int) -> None:
    report = measure(tmp_path, num_adapters=60, pool=pool, num_requests=100, seed=pool)
    assert report.num_evictions == report.num_loads - report.num_resident
    assert report.num_loads >= 60
    assert report.num_resident <= 4 * pool  # the smallest take a quarter of a full adapter's rows
