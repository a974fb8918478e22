"""Jobs' files in a bucket that machines share; `job_files.py` says which."""

import os
import tempfile
from pathlib import Path

from adapters.durable import UNFINISHED, new_directory
from adapters.objects.bucket import Bucket
from adapters.objects.copies import Copies, Copy
from server.training.queue.job_files import DATA_NAME, Statuses

CHECKPOINT = "checkpoint-"
ROWS = "rows"
MODEL, MODEL_MARK = "model-", "config.json"


class SharedJobFiles:
    """Those of all jobs. All of it raises BytesUnavailable."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket.under("jobs")
        self._rows = Copies(self._bucket, DATA_NAME)
        self._models = Copies(self._bucket, MODEL_MARK)

    def push_rows(self, job_id: str, directory: Path) -> None:
        """Upload what was just written into a new job's folder."""
        self._rows.push(job_id, directory, ROWS)

    def fetch_rows(self, job_id: str, directory: Path) -> None:
        """Write them there, `data.json` last; nothing where the job has none."""
        copy = next((copy for copy in self._rows.whole(job_id) if copy.id == ROWS), None)
        if copy is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=directory) as name:
            self._rows.fetch(copy, Path(name))
            for file in sorted(copy.files, key=lambda file: file == DATA_NAME):
                os.replace(Path(name) / file, directory / file)

    def push_model(self, job_id: str, token: int, directory: Path) -> None:
        """Upload what the attempt made."""
        self._models.push(job_id, directory, f"{MODEL}{token}")

    def fetch_model(self, job_id: str, directory: Path) -> None:
        """Write the last attempt's there; nothing where no attempt made one."""
        found = [copy for copy in self._models.whole(job_id) if copy.id.startswith(MODEL)]
        if found:
            last = max(found, key=lambda copy: int(copy.id.removeprefix(MODEL)))
            with new_directory(directory) as unfinished:
                self._models.fetch(last, unfinished)

    def drop_rows(self, job_id: str) -> None:
        """The job's."""
        self._rows.remove(copy for copy in self._rows.of(job_id) if copy.id == ROWS)

    def drop_checkpoints(self, job_id: str) -> None:
        """All of the job's."""
        self._rows.remove(copy for copy in self._rows.of(job_id) if copy.id.startswith(CHECKPOINT))

    def stored(self) -> list[str]:
        """The jobs that have any."""
        return self._bucket.folders()

    def num_bytes(self, job_id: str) -> int:
        """Of all of the job's."""
        return sum(stored.size for stored in self._bucket.listed(f"{job_id}/"))

    def remove(self, job_id: str) -> None:
        """All of the job's."""
        self._bucket.delete([stored.key for stored in self._bucket.listed(f"{job_id}/")])

    def sweep(self, statuses: Statuses, orphan_seconds: float) -> None:
        """As `JobFiles.sweep`; one listing of all jobs."""
        now = self._bucket.now()
        jobs: dict[str, list[Copy]] = {}
        for copy in self._rows.all():
            jobs.setdefault(copy.folder, []).append(copy)
        known = statuses(sorted(jobs))
        for job_id, copies in jobs.items():
            age = (now - max(copy.modified for copy in copies)).total_seconds()
            is_unwanted = known[job_id].has_ended if job_id in known else age > orphan_seconds
            if is_unwanted:
                self._rows.remove(copy for copy in copies if not copy.id.startswith(MODEL))
