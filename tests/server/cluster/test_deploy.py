"""Which changes of settings replace replicas, and errors of replicas that don't start."""

from importlib import import_module
from pathlib import Path
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


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace Ray: `running` replicas serve the base `digest` to `num_apis` API processes."""
    pytest.importorskip("ray.serve", reason="needs the extra cluster")
    deploy = import_module("server.cluster.deploy")
    found = SimpleNamespace(running=0, digest="a", num_apis=0, deployed=[], fault=None)

    def run(settings: Settings, scale: Any, say: object) -> None:
        if found.fault is not None:
            raise found.fault
        found.deployed.append((settings, scale))
        found.running = scale.replicas

    async def served(running: object) -> tuple[str, int]:
        return found.digest, found.num_apis

    monkeypatch.setattr(deploy, "deploy", run)
    monkeypatch.setattr(deploy, "join", lambda address: None)
    monkeypatch.setattr(deploy, "replica_counts", lambda: {"running": found.running})
    monkeypatch.setattr(deploy, "running_replicas", lambda: iter([{}]))
    monkeypatch.setattr(deploy, "_served", served)
    weights = import_module("server.model.base.weights")
    monkeypatch.setattr(weights, "load_base", lambda model: SimpleNamespace(digest=model[0]))
    monkeypatch.setattr(deploy, "base_directory", lambda settings, say: settings.model)
    return found


def redeploy(home: Path, given: dict[str, object], *, forget: bool = False, **flags: Any) -> None:
    settings = load(Settings, home=home, **flags)
    import_module("server.cluster.deploy").redeploy(settings, "here:1", given, forget=forget, say=print)


def test_a_bare_deployment_changes_nothing(cluster: SimpleNamespace, tmp_path: Path) -> None:
    redeploy(tmp_path, {"replicas": 2, "num_cpus": 0.5}, forget=True, model="a", max_queue=5)
    redeploy(tmp_path, {})
    redeploy(tmp_path, {"replicas": 3}, max_queue=6)
    (first, scale), (second, same), (third, more) = cluster.deployed
    assert (second.model, second.max_queue, same) == (first.model, first.max_queue, scale)
    assert (third.model, third.max_queue, more.replicas, more.num_cpus) == ("a", 6, 3, 0.5)


def test_a_deployment_that_fails_is_not_remembered(cluster: SimpleNamespace, tmp_path: Path) -> None:
    redeploy(tmp_path, {"replicas": 2}, forget=True, model="a")
    cluster.fault = StartupError("the engine replicas don't start")
    with pytest.raises(StartupError, match="don't start"):
        redeploy(tmp_path, {"replicas": 4})
    cluster.fault = None
    redeploy(tmp_path, {})
    assert cluster.deployed[-1][1].replicas == 2


def test_replicas_of_which_the_database_does_not_know(cluster: SimpleNamespace, tmp_path: Path) -> None:
    """The defaults would replace whatever runs."""
    cluster.running = 4
    with pytest.raises(StartupError, match="4 replicas run, and this database doesn't know with which flags"):
        redeploy(tmp_path, {})
    assert cluster.deployed == []


def test_another_base_is_refused_while_api_processes_serve_one(cluster: SimpleNamespace, tmp_path: Path) -> None:
    redeploy(tmp_path, {"replicas": 2}, forget=True, model="a")
    cluster.num_apis = 2
    with pytest.raises(StartupError, match=r"API processes \(2\) serve another base than SMOLORA_MODEL=b"):
        redeploy(tmp_path, {}, model="b")
    redeploy(tmp_path, {}, model="another name of the same base")
    cluster.num_apis = 0
    redeploy(tmp_path, {}, model="b")
    assert [settings.model for settings, _ in cluster.deployed] == ["a", "another name of the same base", "b"]
