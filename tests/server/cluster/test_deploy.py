"""Which changes of settings replace replicas, and errors of replicas that don't start."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from server.config import Settings, load
from server.errors import StartupError

pytestmark = pytest.mark.cluster


def test_a_version_depends_on_what_replicas_use() -> None:
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
    assert set(Settings.model_fields) >= import_module("server.cluster.deploy").OF_APIS


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "It failed 3 times. Error:\n  File x\nserver.errors.StartupError: SMOLORA_MODEL=x: no hub id",
            "SMOLORA_MODEL",
        ),
        ("It failed 3 times. Error:\n  File x\nMemoryError: none", "MemoryError: none"),
        ("", "Deploying application smolora failed"),
    ],
    ids=["ours", "another", "untold"],
)
def test_the_error_says_why_replicas_do_not_start(
    message: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = pytest.importorskip("ray.serve", reason="needs the extra cluster")
    deploy = import_module("server.cluster.deploy")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Deploying application smolora failed: Failed to update the deployments ['engine'].")

    deployment = SimpleNamespace(message=message, replica_states={})
    status = SimpleNamespace(
        applications={deploy.APP: SimpleNamespace(deployments={deploy.DEPLOYMENT: deployment})}
    )
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", fail)
    monkeypatch.setattr(serve, "status", lambda: status)
    monkeypatch.setattr(deploy, "is_too_small", lambda *_: False)
    with pytest.raises(StartupError, match=f"^the engine replicas don't start: {expected}"):
        deploy.deploy(load(Settings), deploy.Scale(spare=False), print)


def test_a_cluster_without_room_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = pytest.importorskip("ray.serve", reason="needs the extra cluster")
    deploy, said = import_module("server.cluster.deploy"), list[str]()
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", lambda *_, **__: None)
    monkeypatch.setattr(import_module("ray"), "cluster_resources", lambda: {"CPU": 2.0})
    for replicas, cpus in ((2, 1), (4, 0.5), (4, 1)):
        deploy.deploy(load(Settings), deploy.Scale(replicas, num_cpus=cpus, spare=False), said.append)
    (expected,) = said
    assert expected.startswith(
        "waiting for machines to join: 4 replicas with 1 cores and 0 GPUs each are more than Ray"
    )


@pytest.mark.parametrize(
    ("running", "free", "has_spare"), [(1, 1, False), (1, 2, True), (2, 1, True), (3, 0, False)]
)
def test_room_for_a_spare_excludes_coming_replicas(
    running: int, free: int, has_spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two new replicas would both wait for the last place, and Serve would wait for ever."""
    serve = pytest.importorskip("ray.serve", reason="needs the extra cluster")
    deploy, deployed = import_module("server.cluster.deploy"), list[Any]()
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", lambda scale, **_: deployed.append(scale))
    monkeypatch.setattr(import_module("ray"), "available_resources", lambda: {"CPU": float(free)})
    monkeypatch.setattr(deploy, "replica_counts", lambda: {"running": running})
    monkeypatch.setattr(deploy, "is_too_small", lambda *_: False)
    monkeypatch.setattr(deploy, "engine_app", lambda _, scale: scale)
    deploy.deploy(load(Settings), deploy.Scale(2), print)
    assert [scale.spare for scale in deployed] == [has_spare]
