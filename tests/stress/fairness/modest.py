"""The modest project: a question and an adapter's answer each second, and a one-step job each minute."""

import itertools
import math
import threading
import time
from collections.abc import Iterator
from datetime import datetime

import httpx

from tests.end_to_end.server_process import events
from tests.end_to_end.training_client import ENDED, code_rows
from tests.stress.fairness.report import PERIOD, JobSample, Phase, Sample

QUESTION, ADAPTER = "question", "adapter's answer"
KINDS = (QUESTION, ADAPTER)
JOB_PERIOD = 60.0
PATIENCE = 60.0
"""Seconds after which a request has failed."""
JOB_PATIENCE = 180.0
"""Seconds after which a job that has no time slice to wait for counts as stuck."""
MAX_TOKENS = 16
_LOOK = 0.5  # seconds between two looks at a job


class Modest:
    """The project's client. Safe in any thread."""

    def __init__(self, url: str, secret: str, adapter: str) -> None:
        self._adapter = adapter
        self._numbers = itertools.count()
        self._client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {secret}"},
            timeout=PATIENCE,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )

    def close(self) -> None:
        self._client.close()

    def request(self, method: str, path: str, **content: object) -> httpx.Response:
        """Send a request and return the answer, whatever its status."""
        return self._client.request(method, path, **content)  # type: ignore[arg-type]

    def ask(self, kind: str, due: float | None = None, **fields: object) -> Sample:
        """Ask a short question of the base or of the adapter, streamed. What goes wrong is the sample's fault."""
        due = time.monotonic() if due is None else due
        number = next(self._numbers)
        body: dict[str, object] = {"prompt": f"{number}. What is the capital of country number {number}, and why?"}
        body |= {"max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
        body |= {"adapter": self._adapter} if kind == ADAPTER else {}
        first, fault = None, None
        try:
            for piece in self._stream(body | fields):
                if first is None and "text" in piece:
                    first = time.monotonic() - due
        except (httpx.HTTPError, AssertionError) as error:
            fault = _described(error)
        return Sample(kind, first, time.monotonic() - due, fault)

    def phase(self, seconds: float, most_for_a_job: float) -> Phase:
        """Send all of the project's requests for `seconds`, and wait for the answers.

        `most_for_a_job`: seconds after which a job is cancelled, and counts as never ended.
        """
        found = Phase()
        begun = time.monotonic()

        def ask(kind: str, due: float) -> None:
            found.samples.append(self.ask(kind, due))

        threads = [threading.Thread(target=self._jobs, args=(found, begun, seconds, most_for_a_job))]
        threads[0].start()
        for number in range(int(seconds / PERIOD)):
            for part, kind in enumerate(KINDS):
                due = begun + (number + part / len(KINDS)) * PERIOD
                time.sleep(max(due - time.monotonic(), 0))
                threads.append(threading.Thread(target=ask, args=(kind, due)))
                threads[-1].start()
        for thread in threads:
            thread.join()
        return found

    def job(self, most: float) -> JobSample:
        """Train for one step and wait for the end; after `most` seconds cancel the job."""
        body = {"name": "trained", "data": code_rows(24), "training": {"max_steps": 1}, "lora": {"rank": 4}}
        begun = time.time()  # the clock of the job's own times
        try:
            response = self.request("POST", "/train", json=body)
            if response.status_code != 202:
                return JobSample(math.inf, math.inf, _described(response))
            path = f"/train/{response.json()['id']}"
            while (job := self._job_of(path))["status"] not in ENDED:
                if time.time() - begun > most:
                    self.request("POST", f"{path}/cancel")
                    return JobSample(math.inf, math.inf, f"{job['status']} after {most:.0f} s")
                time.sleep(_LOOK)
        except (httpx.HTTPError, AssertionError) as error:
            return JobSample(math.inf, math.inf, _described(error))
        started, finished = (
            datetime.fromisoformat(str(job[name])).timestamp() for name in ("started_at", "finished_at")
        )
        return JobSample(started - begun, finished - begun, str(job["status"]))

    def _jobs(self, found: Phase, begun: float, seconds: float, most: float) -> None:
        """Submit a job each minute, or as soon as the job before has ended."""
        for number in range(math.ceil(seconds / JOB_PERIOD)):
            time.sleep(max(begun + number * JOB_PERIOD - time.monotonic(), 0))
            found.jobs.append(self.job(most))

    def _job_of(self, path: str) -> dict[str, object]:
        response = self.request("GET", path)
        assert response.status_code == 200, _described(response)
        job: dict[str, object] = response.json()
        return job

    def _stream(self, body: dict[str, object]) -> Iterator[dict[str, object]]:
        with self._client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                response.read()
            assert response.status_code == 200, _described(response)
            yield from events(response.iter_lines())


def _described(failure: httpx.Response | Exception) -> str:
    if isinstance(failure, httpx.Response):
        return f"{failure.status_code} {failure.text[:300]}"
    return f"{type(failure).__name__} {failure}".strip()[:300]
