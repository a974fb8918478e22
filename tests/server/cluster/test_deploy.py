"""Which change of settings has replicas replaced."""

from importlib import import_module

import pytest

from server.config import Settings, load

pytestmark = pytest.mark.cluster


def test_a_version_is_of_what_replicas_use() -> None:
    pytest.importorskip("ray.serve", reason="needs the extra cluster")
    version_of = import_module("server.cluster.deploy").version_of
    settings = load(Settings)
    same = version_of(settings)
    for field, value in (("port", 9000), ("host", "0.0.0.0"), ("trusted_proxies", ("10.0.0.1",))):
        assert version_of(settings.model_copy(update={field: value})) == same
    for field, value in (("max_queue", 5), ("model", "another"), ("bytes_url", "s3://elsewhere")):
        assert version_of(settings.model_copy(update={field: value})) != same


def test_settings_that_replicas_do_not_use_are_settings() -> None:
    pytest.importorskip("ray.serve", reason="needs the extra cluster")
    assert set(Settings.model_fields) >= import_module("server.cluster.deploy")._OF_APIS
