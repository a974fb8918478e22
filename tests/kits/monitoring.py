"""The files of docker/monitoring as values: alerts, and the dashboard's queries as Prometheus takes them."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from server.engine.request import EngineStats
from server.metrics.engine import StatsByReplica

FOLDER = Path(__file__).parents[2] / "docker" / "monitoring"
ALERTS = FOLDER / "alerts.yml"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "smolora.json"
_COMPARISON = re.compile(r"\s+(==|!=|>=|<=|>|<)\s+")


@dataclass(frozen=True)
class Alert:
    name: str
    expression: str
    labels: dict[str, str]
    annotations: dict[str, str]

    def measures(self) -> list[str]:
        """Return the left sides of its comparisons."""
        sides = [_COMPARISON.split(part)[0] for part in _parts(self.expression)]
        return [side for side in sides if not side.startswith("absent(")]


def of_one(stats: Callable[[], EngineStats]) -> StatsByReplica:
    """Return a function that returns the statistics of a server's own engine as `Metrics` takes them."""

    def by_replica(*, is_complete: bool) -> Mapping[str, EngineStats]:
        return {"": stats()}

    return by_replica


def alerts() -> list[Alert]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return [Alert(rule["alert"], rule["expr"], rule["labels"], rule["annotations"]) for rule in group["rules"]]


def queries(window: str = "1m") -> Iterator[tuple[str, str]]:
    """Yield (panel, query), as Grafana sends them for all servers."""
    document = json.loads(DASHBOARD.read_text())
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], _filled(target["expr"], window)
    for annotation in document["annotations"]["list"]:
        yield annotation["name"], _filled(annotation["expr"], window)


def _filled(expression: str, window: str) -> str:
    filled = expression.replace("$__rate_interval", window).replace("$instance", ".*")
    assert "$" not in filled, filled
    return filled


def _parts(expression: str) -> Iterator[str]:
    """Yield the operands of `and` and `or` outside of parentheses."""
    depth, start = 0, 0
    for word in re.finditer(r"[(){}]|\b(?:and|or)\b(?: on \([^)]*\))?", expression):
        if word[0] in "({":
            depth += 1
        elif word[0] in ")}":
            depth -= 1
        elif depth == 0:
            yield expression[start : word.start()].strip()
            start = word.end()
    yield expression[start:].strip()
