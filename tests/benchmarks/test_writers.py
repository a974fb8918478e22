"""The simulation of a cluster's writes, small."""

import pytest

from benchmarks.writers import main
from tests.kits.postgres import CLUSTER, Postgres

pytestmark = CLUSTER


def test_the_lock_is_free_and_no_lease_is_lost(postgres: Postgres, capsys: pytest.CaptureFixture[str]) -> None:
    url = postgres.url(postgres.new())
    assert main(["--database", url, "--seconds", "2", "--workers", "3", "--answers", "40", "--adapters", "9"]) == 0
    said = capsys.readouterr().out
    assert "steps of 3 workers" in said
    assert "leases lost: 0; writes that failed: 0" in said
    postgres.drop(url)
