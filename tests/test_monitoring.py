"""docker/monitoring: alerts that fire exactly when they should, and queries of existing metrics."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from server.database import connect
from server.engine.request import EngineStats
from server.jobs.jobs import Jobs
from server.metrics.engine import GatewayCollector
from server.metrics.home import HomeCollector
from server.metrics.metrics import Metrics, ServerCollector
from server.metrics.quotas import QuotaCollector
from tests.kits.monitoring import ALERTS, DASHBOARD, FOLDER, alerts, of_one, queries

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus"
)
OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"
SAME = '{job="smolora", instance="a:8000"%s}'

HEALTHY: Mapping[str, str] = {
    "up": "1x1600",
    "smolora_ready": "1x1600",
    "smolora_fallbacks": "0x1600",
    "process_start_time_seconds": "-100x1600",
    "process_resident_memory_bytes": "3000000000+1000x1600",
    "process_open_fds": "40x1600",
    "process_max_fds": "1024x1600",
    'smolora_http_requests_total,status="200"': "0+600x1600",
    'smolora_http_requests_total,status="503"': "0+60x1600",
    'smolora_http_requests_total,status="404"': "0+300x1600",
    'smolora_http_requests_total,status="422"': "0+300x1600",
    'smolora_auth_failures_total,reason="missing"': "0+600x1600",
    'smolora_auth_failures_total,reason="unknown"': "0+20x1600",
    'smolora_requests_total,outcome="completed"': "0+600x1600",
    'smolora_requests_total,outcome="cancelled"': "0+100x1600",
    'smolora_requests_total,outcome="failed"': "0x1600",
    'smolora_requests_total,outcome="refused"': "0+6x1600",
    'smolora_requests_total,outcome="invalid"': "0+300x1600",
    'smolora_time_to_first_token_seconds_bucket,le="1"': "0+590x1600",
    'smolora_time_to_first_token_seconds_bucket,le="30"': "0+600x1600",
    'smolora_time_to_first_token_seconds_bucket,le="+Inf"': "0+600x1600",
    "smolora_kv_blocks": "1000x1600",
    "smolora_kv_blocks_used": "999x1600",
    "smolora_preemptions_total": "0x1600",
    "smolora_adapter_evictions_total": "0+60x1600",
    'smolora_refused_total,reason="disk"': "0+2x1600",
    'smolora_refused_total,reason="requests_per_minute"': "0+600x1600",
    'smolora_lane_wait_seconds_bucket,lane="encoding",le="5.0"': "0+590x1600",
    'smolora_lane_wait_seconds_bucket,lane="encoding",le="+Inf"': "0+600x1600",
    'smolora_event_loop_lag_seconds_bucket,le="0.1"': "0+235x1600",
    'smolora_event_loop_lag_seconds_bucket,le="1"': "0+240x1600",
    'smolora_event_loop_lag_seconds_bucket,le="+Inf"': "0+240x1600",
    'smolora_quota_used_ratio,project="acme",limit="max_bytes"': "0.8x1600",
    "smolora_adapters_waiting": "3 0 " * 800,  # different ones
    "smolora_oldest_queued_job_seconds": "600x1600",
    "smolora_last_backup_timestamp_seconds": "0x1600",
    'smolora_jobs,status="queued"': "5x1600",
    'smolora_jobs,status="failed"': "7x1600",
    'smolora_workers,state="busy"': "1x1600",
    "smolora_disk_free_bytes": "100000000000-1000000x1600",
    "smolora_disk_min_free_bytes": "536870912x1600",
}
"""Series of a healthy server, one value a minute for more than a day: busy, full, and refusing a few requests."""
TROUBLE: Mapping[str, Mapping[str, str]] = {
    "SmoloraDown": {"up": "0x1600"},
    "SmoloraNotReady": {"smolora_ready": "0x1600"},
    "SmoloraRestarts": {"process_start_time_seconds": "0+600x1600"},
    "SmoloraFallback": {"smolora_fallbacks": "1x1600"},
    "SmoloraErrors": {'smolora_http_requests_total,status="500"': "0+20x1600"},
    "SmoloraGenerationsFail": {'smolora_requests_total,outcome="failed"': "0+20x1600"},
    "SmoloraRefuses": {'smolora_requests_total,outcome="refused"': "0+200x1600"},
    "SmoloraRefusesWork": {'smolora_refused_total,reason="disk"': "0+20x1600"},
    "SmoloraLaneWaits": {'smolora_lane_wait_seconds_bucket,lane="encoding",le="5.0"': "0+300x1600"},
    "SmoloraLoopLags": {'smolora_event_loop_lag_seconds_bucket,le="0.1"': "0+120x1600"},
    "SmoloraQuotaFull": {'smolora_quota_used_ratio,project="acme",limit="max_bytes"': "0.95x1600"},
    "SmoloraAdaptersWait": {"smolora_adapters_waiting": "1x1600"},
    "SmoloraJobsQueue": {"smolora_oldest_queued_job_seconds": "0+60x1600"},
    "SmoloraBackupOld": {"smolora_last_backup_timestamp_seconds": "-700000x1600"},  # the test's clock begins at 0
    "SmoloraWrongKeys": {'smolora_auth_failures_total,reason="unknown"': "0+40x1600"},
    "SmoloraSlowFirstToken": {'smolora_time_to_first_token_seconds_bucket,le="1"': "0+500x1600"},
    "SmoloraCacheFull": {
        "smolora_preemptions_total": "0+60x1600",
        "smolora_kv_blocks_used": "990 820 " * 800,  # preempted sequences leave room until others have taken it
    },
    "SmoloraAdaptersThrash": {"smolora_adapter_evictions_total": "0+400x1600"},
    "SmoloraJobsWait": {'smolora_workers,state="busy"': "0x1600"},
    "SmoloraJobsFail": {'smolora_jobs,status="failed"': "7x1580 8x20"},
    "SmoloraDiskFull": {"smolora_disk_free_bytes": "100000000000x1500 500000000x100"},
    "SmoloraDiskFills": {"smolora_disk_free_bytes": "100000000000-60000000x1600"},
    "SmoloraFilesRunOut": {"process_open_fds": "1000x1600"},
    "SmoloraMemoryGrows": {"process_resident_memory_bytes": "3000000000+1000000x1600"},
}
"""By alert: the series that differ when it should fire."""
TURNS: Mapping[str, str] = {
    **HEALTHY,
    "smolora_preemptions_total": "0+60x1600",
    "smolora_kv_blocks_used": "600x1600",
}
"""Series of a healthy server that preempts sequences for projects with nothing running."""
GONE: Mapping[str, str] = {"up": "1x60 _x1600"}
"""Series of a target that isn't discovered any more."""


def test_each_alert_has_a_scenario_and_a_description() -> None:
    names = [alert.name for alert in alerts()]
    assert sorted(names) == sorted(TROUBLE)
    text = OPERATIONS.read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(Smolora\w+)` \|", text, re.MULTILINE)
    assert documented == names, "docs/operations.md says of each what it means and what to do, in this order"


def unit_test(series: Mapping[str, str], firing: tuple[str, ...]) -> dict[str, object]:
    """Return a promtool test in which, after a day and some hours, exactly these alerts fire."""
    inputs = []
    for key, values in series.items():
        name, _, label = key.partition(",")
        inputs.append({"series": name + SAME % (f", {label}" if label else ""), "values": values})
    checks = []
    for alert in alerts():
        expected = []
        if alert.name in firing:
            expected = [
                {
                    "exp_labels": {**alert.labels, **_own_labels(alert.name, series)},
                    "exp_annotations": alert.annotations,
                }
            ]
        checks.append({"eval_time": "1590m", "alertname": alert.name, "exp_alerts": expected})
    return {"interval": "1m", "input_series": inputs, "alert_rule_test": checks}


def _own_labels(name: str, series: Mapping[str, str]) -> dict[str, str]:
    is_of_job = series is GONE or name == "SmoloraAdaptersThrash"
    labels = {"job": "smolora", **({} if is_of_job else {"instance": "a:8000"})}
    own = {
        "SmoloraJobsWait": {"status": "queued"},
        "SmoloraJobsFail": {"status": "failed"},
        "SmoloraRefusesWork": {"reason": "disk"},
        "SmoloraLaneWaits": {"lane": "encoding"},
        "SmoloraQuotaFull": {"project": "acme", "limit": "max_bytes"},
    }
    return labels | own.get(name, {})


@pytest.mark.thorough
@needs_promtool
def test_each_alert_fires_alone_in_its_scenario(tmp_path: Path) -> None:
    cases: list[tuple[tuple[str, ...], Mapping[str, str]]] = [((), HEALTHY), ((), TURNS)]
    for name, changes in TROUBLE.items():
        both = ("SmoloraDiskFull", "SmoloraDiskFills") if name == "SmoloraDiskFull" else (name,)
        cases.append((both, {**HEALTHY, **changes}))
    cases.append((("SmoloraDown",), GONE))
    for number, (firing, series) in enumerate(cases):
        document = {"rule_files": [str(ALERTS)], "evaluation_interval": "5m", "tests": [unit_test(series, firing)]}
        (tmp_path / f"{number}.yml").write_text(yaml.safe_dump(document))
    command = ["promtool", "test", "rules", *map(str, sorted(tmp_path.glob("*.yml")))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_vanished_server_is_not_shown_as_ready(tmp_path: Path) -> None:
    """The panel shows the last value, so there must always be one."""
    (query,) = [query for panel, query in queries() if panel == "Server"]
    cases = [
        ({"up": "1x60", "smolora_ready": "1x60"}, 1),
        ({"up": "1x60", "smolora_ready": "0x60"}, 0),
        ({"up": "1x10 0x50", "smolora_ready": "1x10 _x50"}, 0),
        ({"up": "1x10 _x50", "smolora_ready": "1x10 _x50"}, 0),
        ({}, 0),
    ]
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name + SAME % "", "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {"expr": query, "eval_time": "40m", "exp_samples": [{"labels": "{}", "value": value}]}
            ],
        }
        for series, value in cases
    ]
    (tmp_path / "ready.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": tests}))
    command = ["promtool", "test", "rules", str(tmp_path / "ready.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_accepts_the_files(tmp_path: Path) -> None:
    text = (FOLDER / "prometheus.yml").read_text()
    (tmp_path / "key").write_text("")
    (tmp_path / "prometheus.yml").write_text(text.replace("/tmp/metrics-key", str(tmp_path / "key")))
    shutil.copy(ALERTS, tmp_path)
    done = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


def test_every_queried_metric_exists(tmp_path: Path) -> None:
    collectors = [
        GatewayCollector(EngineStats, "tiny", lambda _: [], lambda: 0, 16),
        HomeCollector(tmp_path, Jobs(connect(tmp_path)), 0),
        ServerCollector("tiny", lambda: True),
        QuotaCollector(dict),
    ]
    text = Metrics(of_one(EngineStats), collectors).render().decode()
    there = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) | {"up", "ALERTS"}
    there |= {f"{name}_bucket" for name in re.findall(r"^# TYPE (\S+) histogram", text, re.MULTILINE)}
    asked = {name for _, query in queries() for name in _metrics_in(query)}
    asked |= {name for alert in alerts() for name in _metrics_in(alert.expression)}
    assert asked - there == set()
    own = {name for name in there if name.startswith("smolora_") and not name.endswith("_bucket")}
    assert {name for name in own if name not in asked and f"{name}_bucket" not in asked} == set(), (
        "nobody sees them"
    )


def test_shared_metric_names_are_restricted_to_smolora() -> None:
    """A user's Prometheus scrapes other jobs too: every process has `process_…`, and vLLM its own names."""
    asked = [query for _, query in queries()] + [alert.expression for alert in alerts()]
    found = [selector for query in asked for selector in re.findall(r"(?:\bprocess_|vllm:)\w+(?:{[^}]*})?", query)]
    assert found
    assert [selector for selector in found if 'job="smolora"' not in selector] == []


def _metrics_in(query: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', '""', query)
    return set(re.findall(r"\b(?:smolora_|process_|vllm:)\w+|\bup\b|\bALERTS\b", bare))


def test_dashboard_can_be_provisioned() -> None:
    document = json.loads(DASHBOARD.read_text())
    sources = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    panels = [panel for panel in document["panels"] if panel["type"] != "row"]
    (variable,) = [one for one in document["templating"]["list"] if one["type"] == "datasource"]
    assert {panel["datasource"]["uid"] for panel in panels} == {f"${{{variable['name']}}}"}
    assert [(source["type"], source["name"], source["uid"]) for source in sources] == [
        (variable["query"], variable["current"]["text"], variable["current"]["value"])
    ]
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    places: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & places, panel["title"]
        places |= covered


def test_dashboard_works_with_any_data_source() -> None:
    """The dashboard doesn't name a data source by id, which differs between installations: neither panels nor
    queries do."""
    document = json.loads(DASHBOARD.read_text())
    named = list(_sources_of(document))
    assert len(named) > 2 * len([panel for panel in document["panels"] if panel["type"] != "row"])
    assert {(source["type"], source["uid"]) for source in named} == {("prometheus", "${datasource}")}
    first, *_ = document["templating"]["list"]
    assert (first["name"], first["type"]) == ("datasource", "datasource"), "what the others are looked up in"


def _sources_of(part: object) -> Iterator[dict[str, str]]:
    """Yield each `datasource` of the dashboard."""
    if isinstance(part, list):
        for one in part:
            yield from _sources_of(one)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key == "datasource" and isinstance(value, dict):
                yield value
            else:
                yield from _sources_of(value)


def test_docs_mention_allowed_hosts_for_scraping() -> None:
    """If SMOLORA_ALLOWED_HOSTS lacks the name, the answer is 403, even with a key that has the scope."""
    (row,) = re.findall(r"^\| `SmoloraDown` \|.*$", OPERATIONS.read_text(encoding="utf-8"), re.MULTILINE)
    head = (FOLDER / "prometheus.yml").read_text().partition("\nglobal:")[0]
    for text in (row, head.partition("Elsewhere")[2]):
        assert "SMOLORA_ALLOWED_HOSTS" in text
        assert "address" in text


def test_containers_can_read_a_private_checkout(tmp_path: Path) -> None:
    """With the documented command: Prometheus and Grafana run as users of their own."""
    (command,) = set(re.findall(r"chmod -R \S+ docker/monitoring", OPERATIONS.read_text(encoding="utf-8")))
    assert command in (FOLDER / "compose.yml").read_text().partition("\nservices:")[0]
    shut = tmp_path / "docker" / "monitoring"
    shutil.copytree(FOLDER, shut)
    for path in (shut, *shut.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    for path in (shut, *shut.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


@needs_promtool
def test_prometheus_container_gets_its_key(tmp_path: Path) -> None:
    """Its shell command runs with other folders, and with echo instead of Prometheus."""
    service = yaml.safe_load((FOLDER / "compose.yml").read_text())["services"]["prometheus"]
    assert service["entrypoint"] == ["/bin/sh", "-c"]
    (command,) = service["command"]
    command = command.replace("$$", "$").replace("/tmp", str(tmp_path)).replace("/bin/prometheus", "echo")
    assert set(service["environment"]) == {"METRICS_KEY"}
    environment = {"PATH": os.environ["PATH"], "METRICS_KEY": "sk-a b$c"}
    done = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=True)
    key = tmp_path / "metrics-key"
    assert (key.read_text(), key.stat().st_mode & 0o777) == ("sk-a b$c", 0o600)
    (config,) = re.findall(r"--config\.file=(\S+)", done.stdout)
    mounted = {place: file for file, place, *_ in (volume.split(":") for volume in service["volumes"])}
    there = tmp_path / "etc"
    there.mkdir()
    for name in (config, config.replace("prometheus.yml", "alerts.yml")):
        text = (FOLDER / mounted[name]).read_text()
        (there / Path(name).name).write_text(text.replace("/tmp/metrics-key", str(key)))
    command = ["promtool", "check", "config", str(there / Path(config).name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


def test_prometheus_scrapes_the_container_port() -> None:
    """Inside the network that is one port, whichever port is published on the host."""
    services = yaml.safe_load((FOLDER.parent.parent / "docker-compose.yml").read_text())["services"]
    listens = {name: int(port.rpartition(":")[2]) for name in services for port in services[name].get("ports", ())}
    assert set(listens) == {"server", "server-gpu"}
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert {name: found["port"] for found in job["dns_sd_configs"] for name in found["names"]} == listens


def test_compose_starts_both_only_when_asked() -> None:
    """With read-only files from this folder, and ports on the loopback only."""
    included = yaml.safe_load((FOLDER.parent.parent / "docker-compose.yml").read_text())["include"]
    assert included == ["docker/monitoring/compose.yml"]
    services = yaml.safe_load((FOLDER / "compose.yml").read_text())["services"]
    assert set(services) == {"prometheus", "grafana"}
    for service in services.values():
        assert service["profiles"] == ["monitoring"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source, _, rest = volume.partition(":")
            if source.startswith("."):
                assert (FOLDER / source).exists()
                assert rest.endswith(":ro")
