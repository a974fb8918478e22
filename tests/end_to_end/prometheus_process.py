"""A real Prometheus that scrapes servers of tests, with the alerts of docker/monitoring."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.end_to_end.server_process import PATIENCE, ServerProcess, free_port
from tests.end_to_end.training_client import wait_until
from tests.kits.monitoring import ALERTS, FOLDER

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Debian's package prometheus"
)


class Prometheus:
    """A Prometheus that scrapes servers each second, otherwise configured as in docker/monitoring."""

    def __init__(self, directory: Path, key: str, rules: str | None = None) -> None:
        """`key` is sent to all servers. `rules` are other alerts than those of docker/monitoring."""
        self.moment: float | None = None
        """The time at which `values` evaluates queries, in seconds since 1970; None: now."""
        self.url = f"http://127.0.0.1:{free_port()}"
        self._targets = directory / "targets.json"
        self._scraped: list[str] = []
        (directory / "key").write_text(key)
        (directory / ALERTS.name).write_text(ALERTS.read_text() if rules is None else rules)
        self._targets.write_text("[]")
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        del job["dns_sd_configs"]
        job["file_sd_configs"] = [{"files": [str(self._targets)], "refresh_interval": "1s"}]
        job["authorization"] = {"credentials_file": str(directory / "key")}
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        words = [
            "prometheus",
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log)

    def scrape(self, server: ServerProcess) -> None:
        """Begin to scrape the server, and wait until that works."""
        instance = instance_of(server)
        self._scraped.append(instance)
        new = self._targets.with_suffix(".new")
        new.write_text(json.dumps([{"targets": self._scraped}]))
        new.rename(self._targets)
        wait_until(lambda: self._is_scraping(instance), what="the first scrape")

    def get(self, path: str, **parameters: str) -> Any:
        response = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, trust_env=False)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, query: str) -> list[float]:
        """Return the values of the query's series at `moment`."""
        at = {} if self.moment is None else {"time": f"{self.moment:.3f}"}
        return [float(sample["value"][1]) for sample in self.get("query", query=query, **at)["result"]]

    def state_of(self, alert: str) -> str:
        (group,) = self.get("rules")["groups"]
        (rule,) = [rule for rule in group["rules"] if rule["name"] == alert]
        assert rule["health"] == "ok", rule
        return str(rule["state"])

    def firing(self, server: ServerProcess) -> set[str]:
        """Return the names of the alerts that fire for the server, or for all servers together."""
        mine = instance_of(server)
        firing = [one["labels"] for one in self.get("alerts")["alerts"] if one["state"] == "firing"]
        return {labels["alertname"] for labels in firing if labels.get("instance", mine) == mine}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)

    def _is_scraping(self, instance: str) -> bool:
        try:
            # It listens before it can be queried, and returns 503 until then.
            is_ready = httpx.get(f"{self.url}/-/ready", trust_env=False).status_code == 200
            return is_ready and self.values(f'up{{job="smolora", instance="{instance}"}}') == [1.0]
        except httpx.TransportError:
            assert self._process.poll() is None, self._log.read_text()
            return False


def instance_of(server: ServerProcess) -> str:
    """Return the label `instance` of the server's series."""
    return server.url.removeprefix("http://")
