"""The server's process beyond what prometheus_client tells of it: its version, its threads, whether it serves."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server import __version__

_THREADS = "/proc/self/task"


class ServerCollector(Collector):
    """`is_ready` is what /ready says."""

    def __init__(self, base_name: str, is_ready: Callable[[], bool]) -> None:
        self._base_name = base_name
        self._is_ready = is_ready

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("smolora_build_info", "What runs here", labels=["version", "base"])
        info.add_metric([__version__, self._base_name], 1)
        yield info
        yield GaugeMetricFamily("smolora_ready", "1 while /ready says 200", value=int(self._is_ready()))
        with suppress(OSError):  # of systems without /proc
            threads = len(os.listdir(_THREADS))
            yield GaugeMetricFamily("process_threads", "Threads, Python's and others", value=threads)
