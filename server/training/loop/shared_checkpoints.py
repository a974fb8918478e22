"""A job's checkpoints in a bucket, so that a worker on another machine goes on from them."""

import logging
from pathlib import Path

from adapters.durable import new_directory
from adapters.errors import BytesUnavailable
from adapters.objects.bucket import Bucket, Missing
from adapters.objects.copies import Copies, Copy
from server.training.loop.checkpoint import NAME, STATE_NAME, Checkpoint, Checkpoints, read_checkpoint

_PREFIX = "checkpoint-"

log = logging.getLogger("smolora.training")


class SharedCheckpoints(Checkpoints):
    """As `Checkpoints`, of the folder `jobs/<id>` of a bucket; `directory` has this machine's.

    Each is a copy of its own whose name has the fencing token: a worker that lost its job overwrites nothing, and
    what it leaves there is older than what its successor does.
    """

    def __init__(self, directory: Path, token: int, bucket: Bucket, job_id: str) -> None:
        super().__init__(directory, token)
        self._copies = Copies(bucket.under("jobs"), STATE_NAME)
        self._job_id = job_id

    def save(self, checkpoint: Checkpoint) -> None:
        """As `Checkpoints.save`, and in the bucket, without which training goes on where that can't be reached."""
        super().save(checkpoint)
        name = f"{self._token}-{checkpoint.step}"
        try:
            if name not in (f"{token}-{step}" for token, step, _ in self._shared()):
                self._copies.push(self._job_id, self._directory / name, f"{_PREFIX}{name}")
            self._copies.remove(copy for _, _, copy in self._shared()[:-1])
        except BytesUnavailable:
            log.warning("the checkpoint of step %d stays on this machine alone", checkpoint.step)
        except FileNotFoundError:
            log.warning("the checkpoint of step %d was removed already: the job is another's", checkpoint.step)

    def newest(self) -> Checkpoint | None:
        """The newest of all machines that can be read; None before the first. Raises BytesUnavailable."""
        for token, step, copy in reversed(self._shared()):
            place = self._directory / f"{token}-{step}"
            try:
                if not place.is_dir():
                    with new_directory(place) as unfinished:
                        self._copies.fetch(copy, unfinished)
            except Missing:  # being removed by another worker
                continue
            if (found := read_checkpoint(place, step)) is not None:
                return found
        return None

    def _shared(self) -> list[tuple[int, int, Copy]]:
        """(token, step, copy) of the whole ones in the bucket, the oldest first."""
        found = []
        for copy in self._copies.whole(self._job_id):
            match = NAME.fullmatch(copy.id.removeprefix(_PREFIX)) if copy.id.startswith(_PREFIX) else None
            if match is not None:
                found.append((int(match[1]), int(match[2]), copy))
        return sorted(found, key=lambda each: each[:2])
