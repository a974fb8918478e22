"""What a deployment takes from the one before."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from server.cluster.deployed import OF_APIS, Deployed, Scale, merged_scale, merged_settings, recall, remember
from server.config import Settings, load
from server.database import connect
from server.errors import StartupError


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(tmp_path / "home")
    yield engine
    engine.dispose()


def test_a_deployment_is_remembered(database: sa.Engine) -> None:
    assert recall(database) is None
    for scale in (Scale(2, 4, num_cpus=0.5, is_ranged=True), Scale(3)):
        deployed = Deployed({"model": "tiny", "max_queue": 5}, scale)
        remember(database, deployed)
        assert recall(database) == deployed
    remember(database, None)
    assert recall(database) is None


def test_only_what_is_given_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLORA_MAX_QUEUE", "9")
    before = Deployed({"home": "/first", "model": "tiny", "max_queue": 5, "no_longer_there": 1}, Scale(4))
    found = merged_settings(before, load(Settings, home=tmp_path, device="cpu"))
    expected = {"home": Path("/first"), "model": "tiny", "max_queue": 9, "device": "cpu"}
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.model_fields_set - OF_APIS == expected.keys(), "these are remembered"
    bare = load(Settings, home=tmp_path)
    assert merged_settings(None, bare) is bare


def test_the_scale_stays_unless_it_is_given() -> None:
    before = Deployed({}, Scale(4, num_cpus=2))
    assert merged_scale(before, {}) == Scale(4, num_cpus=2)
    assert merged_scale(before, {"replicas": 5}) == Scale(5, num_cpus=2)
    assert merged_scale(None, {}) == Scale()


def test_a_fixed_number_after_autoscaling_is_a_range_of_one_number() -> None:
    """Replicas that started with autoscaling keep reporting for it, and would fail once a second without it."""
    scale = merged_scale(None, {"replicas": 1, "most": 3})
    assert (scale.is_autoscaled, scale.is_ranged) == (True, True)
    scale = merged_scale(Deployed({}, scale), {"replicas": 2, "most": 2})
    assert (scale.is_autoscaled, scale.is_ranged) == (False, True)


def test_more_replicas_than_the_last_deployment_allows() -> None:
    before = Deployed({}, Scale(1, 2))
    message = r"--max-replicas 2 is less than --replicas 3 \(of the last deployment: give both\)"
    with pytest.raises(StartupError, match=message):
        merged_scale(before, {"replicas": 3})
