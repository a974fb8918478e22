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


COMPONENTS = ("api", "engine", "head", "valkey", "worker")


def test_ray_has_the_same_environment_as_elsewhere() -> None:
    """Except for its log, which goes where pods' logs go."""
    wanted = {name: value for name, value in RAY_DEFAULTS.items() if name != "RAY_SERVE_LOG_TO_STDERR"}
    assert wanted.items() <= the("ConfigMap", "smolora")["data"].items()


def test_manifests_include_what_a_cluster_needs() -> None:
    assert sorted(templates()) == list(COMPONENTS)
    budgets = {doc["metadata"]["name"]: doc for doc in DOCUMENTS if doc["kind"] == "PodDisruptionBudget"}
    for component in ("api", "engine", "worker"):
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
    messages = import_module("server.cluster.messages")
    (application,) = serve_config()["applications"]
    module, _, function = application["import_path"].partition(":")
    assert callable(getattr(import_module(module), function))
    assert module == deploy.__name__
    assert application["name"] == messages.APP
    assert [deployment["name"] for deployment in application["deployments"]] == [messages.DEPLOYMENT]


def test_a_budget_of_pods_without_a_scale_states_a_minimum() -> None:
    """For maxUnavailable, Kubernetes asks the pods' owner for its scale. A RayCluster has none, so no pod could be
    evicted."""
    scaled = {
        doc["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for doc in DOCUMENTS
        if doc["kind"] == "Deployment"
    }
    budgets = [doc for doc in DOCUMENTS if doc["kind"] == "PodDisruptionBudget"]
    for budget in budgets:
        component = budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
        assert component in scaled or budget["spec"].keys() == {"minAvailable", "selector"}
    (group,) = the("RayService", "smolora")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert the("PodDisruptionBudget", "smolora-engine")["spec"]["minAvailable"] < group["replicas"]


def test_api_pods_are_scaled_by_their_processors() -> None:
    """Applying the Deployment again must not undo the autoscaler's number."""
    spec = the("HorizontalPodAutoscaler", "smolora-api")["spec"]
    target = spec["scaleTargetRef"]
    assert "replicas" not in the(target["kind"], target["name"])["spec"]
    assert 2 <= spec["minReplicas"] < spec["maxReplicas"]
    assert container("api")["resources"]["requests"]["cpu"] == "1", "utilization is relative to the request"


def test_a_new_image_is_rolled_out() -> None:
    """With the strategy None, KubeRay ignores it."""
    spec = the("RayService", "smolora")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["rayClusterDeletionDelaySeconds"] >= 600, "API pods are replaced meanwhile"
    assert the("Deployment", "smolora-api")["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"], "KubeRay ignores changes of these"


def test_ray_heads_state_outlives_the_head() -> None:
    options = the("RayService", "smolora")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    service = the("Service", "smolora-valkey")
    (port,) = service["spec"]["ports"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port['port']}"
    (variable,) = container("valkey")["env"]
    assert options["redisPassword"]["valueFrom"] == variable["valueFrom"]
    assert service["spec"]["selector"] == templates()["valkey"]["metadata"]["labels"]


def secrets_of(component: str) -> set[str]:
    references = [
        variable["valueFrom"]["secretKeyRef"]
        for variable in container(component).get("env", ())
        if "valueFrom" in variable
    ]
    return {f"{reference['name']}/{reference['key']}" for reference in references}


def test_pods_have_only_the_secrets_that_they_use() -> None:
    assert secrets_of("head") == set()
    assert secrets_of("engine") == {"smolora-reader/aws-access-key-id", "smolora-reader/aws-secret-access-key"}
    writes = {"smolora/database-url", "smolora/aws-access-key-id", "smolora/aws-secret-access-key"}
    assert secrets_of("worker") == writes
    assert secrets_of("api") == writes | {"smolora/api-keys", "smolora-ray/auth_token"}


def test_training_gets_no_share_of_an_engine_pods_gpu() -> None:
    assert the("ConfigMap", "smolora")["data"]["SMOLORA_WORKERS"] == "0"
    for component in ("api", "engine", "head"):
        assert container(component)["envFrom"] == [{"configMapRef": {"name": "smolora"}}]


def may_connect(client: str, server: str, port: int) -> bool:
    """Return whether a pod of one component may connect to one of another by the NetworkPolicies."""

    def selects(selector: Mapping[str, Any], component: str) -> bool:
        labels = {"app.kubernetes.io/name": "smolora", "app.kubernetes.io/component": component}
        return selector.get("matchLabels", {}).items() <= labels.items() and all(
            rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"]
            for rule in selector.get("matchExpressions", ())
        )

    policies = [doc["spec"] for doc in DOCUMENTS if doc["kind"] == "NetworkPolicy"]
    chosen = [policy for policy in policies if selects(policy["podSelector"], server)]
    assert chosen, "without a policy everybody may"
    for rule in (rule for policy in chosen for rule in policy.get("ingress", ())):
        peers = [peer for peer in rule.get("from", [{"podSelector": {}}]) if "namespaceSelector" not in peer]
        ports = [given["port"] for given in rule.get("ports", [{"port": port}])]
        if port in ports and any(selects(peer["podSelector"], client) for peer in peers):
            return True
    return False


def test_pods_are_reached_only_by_pods_that_need_them() -> None:
    ray = ("api", "engine", "head")
    for server in COMPONENTS:
        for client in COMPONENTS:
            assert may_connect(client, server, 10001) == (client in ray and server in ray)
            assert may_connect(client, server, 6379) == (
                (client in ray and server in ray) or (client, server) == ("head", "valkey")
            )
            assert may_connect(client, server, 8000) == (server == "api" or (client in ray and server in ray))


def test_each_worker_has_room_for_one_replica() -> None:
    (application,) = serve_config()["applications"]
    (deployment,) = application["deployments"]
    (group,) = the("RayService", "smolora")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert deployment["num_replicas"] <= group["replicas"]
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
    grace = import_module("server.cluster.node").STOP_SECONDS + DRAIN_SECONDS + HURRY_SECONDS
    assert templates()["api"]["spec"]["terminationGracePeriodSeconds"] > pause + grace
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
    command = container("api")["command"]
    assert command[:4] == ["smolora", "cluster", "up", "--address"]
    assert command[4] == "smolora-head-svc:6379"
    source = (ROOT / "server" / "cli" / "cluster.py").read_text()
    functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    assert command[2] in functions
