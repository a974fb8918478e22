"""How much of their limits projects have used, in /metrics.

Counting stored bytes reads lists from the disk, so it is done once a minute. Rates aren't here: a refusal of a
rate is counted by its reason.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.metrics.aside import Aside

KEEP_SECONDS = 60.0
MAX_PROJECTS = 100
"""The most projects in one scrape: the projects with the highest shares."""

Use = Mapping[tuple[str, str], float]
"""By project and limit, such as ("acme", "max_bytes"): the share that is used."""

log = logging.getLogger("smolora.metrics")


class QuotaCollector(Collector):
    """Metrics of the projects that have limits. `read` does disk I/O. Not thread-safe."""

    def __init__(self, read: Callable[[], Use], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._read_at = float("-inf")
        self._use: Use = {}
        self._aside = Aside()

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        if self._clock() - self._read_at >= KEEP_SECONDS:
            self._read_at = self._clock()
            try:
                self._use = self._aside.run(self._read)
            except Exception as error:  # the database or the disk fails
                self._use = {}
                log.warning("use of quotas can't be read: %s", type(error).__name__)
        text = "Share of a project's limit that is used"
        family = GaugeMetricFamily("smolora_quota_used_ratio", text, labels=["project", "limit"])
        most = sorted(self._use.items(), key=lambda one: one[1], reverse=True)[:MAX_PROJECTS]
        for labels, share in most:
            family.add_metric(labels, share)
        yield family
