"""The manifests of docker/kubernetes: valid, without secrets, locked down, with the timeouts that the code
needs."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.config import PREFIX, Settings, WorkerSettings
from server.config.environment import RAY_DEFAULTS
from server.jobs.supervisor import GRACE_SECONDS
from server.serve.process import DRAIN_SECONDS, HURRY_SECONDS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docker" / "kubernetes"
KUBERNETES = "1.34"
DOCUMENTS: list[Mapping[str, Any]] = [
    document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
RAY_SERVICE = json.loads((ROOT / "tests" / "kits" / "ray_service.schema.json").read_text())
"""The fields of KubeRay's RayService used here, written manually. The manifest was validated against the whole v1
schema (ray-project/kuberay at feeaf72f, unknown fields refused) when it was written."""


def the(kind: str, name: str) -> Mapping[str, Any]:
    (found,) = (doc for doc in DOCUMENTS if doc["kind"] == kind and doc["metadata"]["name"] == name)
    return found


def templates() -> dict[str, Mapping[str, Any]]:
    """Return every pod template by its component."""
    cluster = the("RayService", "smolora")["spec"]["rayClusterConfig"]
    found = [doc["spec"]["template"] for doc in DOCUMENTS if doc["kind"] == "Deployment"]
    found += [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in found}


def serve_config() -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load(the("RayService", "smolora")["spec"]["serveConfigV2"])
    return found


def container(component: str) -> Mapping[str, Any]:
    (found,) = templates()[component]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


COMPONENTS = ("api", "engine", "head", "worker")


def test_ray_has_the_same_environment_as_elsewhere() -> None:
    """Except for its log, which goes where pods' logs go."""
    wanted = {name: value for name, value in RAY_DEFAULTS.items() if name != "RAY_SERVE_LOG_TO_STDERR"}
    assert wanted.items() <= the("ConfigMap", "smolora")["data"].items()


def test_manifests_include_what_a_cluster_needs() -> None:
    assert sorted(templates()) == list(COMPONENTS)
    budgets = {doc["metadata"]["name"]: doc for doc in DOCUMENTS if doc["kind"] == "PodDisruptionBudget"}
    for component in COMPONENTS:
        selected = budgets[f"smolora-{component}"]["spec"]["selector"]["matchLabels"]
        assert selected.items() <= templates()[component]["metadata"]["labels"].items()
    assert the("Service", "smolora")["spec"]["selector"] == templates()["api"]["metadata"]["labels"]


@pytest.mark.cluster
def test_builtin_kinds_are_valid() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs the extra cluster-dev")
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates().values()]
    for document in [*(doc for doc in DOCUMENTS if doc["kind"] != "RayService"), *pods]:
        validate.validate(document, KUBERNETES, strict=True)
    wrong = {**the("Service", "smolora"), "spec": {"ports": [{"port": "http"}]}}
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, KUBERNETES, strict=True)


def test_the_ray_service_is_valid() -> None:
    service = the("RayService", "smolora")
    jsonschema.validate(service, RAY_SERVICE)
    wrong = {**service, "spec": {**service["spec"], "serveConfig": ""}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAY_SERVICE)


@pytest.mark.cluster
def test_serves_config_is_valid() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs the extra cluster")
    schema.ServeDeploySchema.model_validate(serve_config())
    version = import_module("ray").__version__
    assert the("RayService", "smolora")["spec"]["rayClusterConfig"]["rayVersion"] == version


@pytest.mark.cluster
def test_serve_config_names_existing_objects() -> None:
    pytest.importorskip("ray.serve", reason="needs the extra cluster")
    deploy = import_module("server.cluster.deploy")
    transport = import_module("server.cluster.transport")
    (application,) = serve_config()["applications"]
    module, _, function = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), function))
    assert module == deploy.__name__
    assert application["name"] == transport.APP
    assert [deployment["name"] for deployment in application["deployments"]] == [transport.DEPLOYMENT]


def test_each_worker_has_room_for_one_replica() -> None:
    (application,) = serve_config()["applications"]
    (deployment,) = application["deployments"]
    (group,) = the("RayService", "smolora")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert deployment["num_replicas"] <= group["replicas"] <= group["maxReplicas"]
    wanted = deployment["ray_actor_options"]["num_cpus"]
    assert container("engine")["resources"]["limits"]["cpu"] == str(wanted)


@pytest.mark.parametrize("component", COMPONENTS)
def test_pods_are_locked_down(component: str) -> None:
    pod = templates()[component]["spec"]
    user = int(re.search(r"USER (\d+)", (ROOT / "docker" / "Dockerfile").read_text())[1])  # type: ignore[index]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == user
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container(component)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounted = {mount["name"]: mount["mountPath"] for mount in container(component)["volumeMounts"]}
    assert {"/data", "/tmp"} <= set(mounted.values())
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    assert {"requests", "limits"} == set(container(component)["resources"])
    assert "memory" in container(component)["resources"]["limits"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_service_changes_a_setting(component: str) -> None:
    """Kubernetes sets variables for each service by its name, such as SMOLORA_PORT=tcp:

    …:80.
    """
    assert f"{PREFIX}PORT" in (f"{service.upper()}_PORT" for service in services())
    assert templates()[component]["spec"]["enableServiceLinks"] is False


def services() -> list[str]:
    return [doc["metadata"]["name"] for doc in DOCUMENTS if doc["kind"] == "Service"]


def environment(value: object) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, dict):
        yield from value.get("env", ())
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from environment(item)


def test_secrets_are_only_referenced() -> None:
    assert all(doc["kind"] != "Secret" for doc in DOCUMENTS)
    variables = [variable for document in DOCUMENTS for variable in environment(document)]
    secret = re.compile("KEY|TOKEN|SECRET|PASSWORD|DATABASE_URL")
    assert {variable["name"] for variable in variables if secret.search(variable["name"])} >= {
        "SMOLORA_DATABASE_URL",
        "SMOLORA_API_KEYS",
        "AWS_SECRET_ACCESS_KEY",
        "RAY_AUTH_TOKEN",
    }
    for variable in variables:
        assert ("valueFrom" in variable) == bool(secret.search(variable["name"])), variable["name"]
    assert not any(secret.search(name) for name in the("ConfigMap", "smolora")["data"])
    how_to = (FOLDER / "settings.yaml").read_text()
    for variable in variables:
        if "valueFrom" in variable:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert f"secret generic {reference['name']} " in how_to
            assert f"--from-literal={reference['key']}=" in how_to


def test_variables_are_known_settings() -> None:
    known = {name.upper() for name in (*Settings.model_fields, *WorkerSettings.model_fields)}
    names = {variable["name"] for document in DOCUMENTS for variable in environment(document)}
    names |= set(the("ConfigMap", "smolora")["data"])
    assert {name.removeprefix("SMOLORA_") for name in names if name.startswith("SMOLORA_")} <= known


def test_grace_periods_cover_shutdown() -> None:
    """The grace period covers the pause before SIGTERM and all timeouts of the process."""
    pause = int(container("api")["lifecycle"]["preStop"]["exec"]["command"][1])
    assert templates()["api"]["spec"]["terminationGracePeriodSeconds"] > pause + DRAIN_SECONDS + HURRY_SECONDS
    assert templates()["worker"]["spec"]["terminationGracePeriodSeconds"] > GRACE_SECONDS


def test_probes_use_existing_routes() -> None:
    api = container("api")
    assert api["livenessProbe"]["httpGet"]["path"] == api["startupProbe"]["httpGet"]["path"] == "/health"
    assert api["readinessProbe"]["httpGet"]["path"] == "/ready"
    hosts = the("ConfigMap", "smolora")["data"]["SMOLORA_ALLOWED_HOSTS"].split(",")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        (header,) = api[probe]["httpGet"]["httpHeaders"]
        assert header["value"] in hosts
        assert api[probe]["httpGet"]["port"] == "http"
    assert {"name": "http", "containerPort": Settings.model_fields["port"].default} in api["ports"]


@pytest.mark.parametrize("component", ["head", "engine"])
def test_ray_nodes_have_probes_of_their_own(component: str) -> None:
    """KubeRay adds default probes to containers without probes; up to 1.5 these run wget."""
    node = container(component)
    for probe in ("livenessProbe", "readinessProbe"):
        assert node[probe]["httpGet"] == {"path": "/api/healthz", "port": "agent"}
    assert {"name": "agent", "containerPort": 52365} in node["ports"]


def test_commands_exist_in_smolora() -> None:
    assert container("worker")["command"] == ["smolora", "worker"]
    line = container("api")["command"][-1]
    assert line.endswith("exec smolora cluster api --address auto")
    source = (ROOT / "server" / "cli" / "cluster.py").read_text()
    functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    assert "api" in functions
