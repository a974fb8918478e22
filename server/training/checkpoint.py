"""A job's checkpoints on disk: whole or not there, wherever a process is killed.

    <checkpoints>/<token>-<step>/   state.safetensors   masters and moments, now and at the best evaluation
                                    state.json          the step, the best loss, patience, what was measured so far
    <checkpoints>/.unfinished-…     being written

`token` is the claim's fencing token: a worker that lost its job writes beside, never over, what its successor
wrote. The newest is the one of the highest token, then of the highest step. Older ones are removed when a newer
one is in place, and what earlier attempts left unfinished before one is written.

A job's checkpoints in a bucket, so that a worker on another machine goes on from them.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adapters.errors import BytesUnavailable
from adapters.storage.bucket import Bucket, Missing
from adapters.storage.copies import Copies, Copy
from adapters.storage.durable import UNFINISHED, new_directory

NAME = re.compile(r"(\d+)-(\d+)")
_UNFINISHED_NAME = re.compile(rf"{re.escape(UNFINISHED)}(\d+)-\d+-.*")
_TENSORS, STATE_NAME = "state.safetensors", "state.json"
FILE_NAMES = frozenset({_TENSORS, STATE_NAME})


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that a run goes on from. `state` is JSON; no random state is among it: there is none."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, object]


class Checkpoints:
    """Those of one job, written under one fencing token."""

    def __init__(self, directory: Path, token: int) -> None:
        self._directory = directory
        self._token = token

    def save(self, checkpoint: Checkpoint) -> None:
        """Store it and then remove the older ones. Raises OSError, with nothing half-written left."""
        place = self._directory / f"{self._token}-{checkpoint.step}"
        if place.exists():
            return  # this attempt has stored that step
        self._drop_unfinished()
        with new_directory(place) as unfinished:
            save_file(dict(checkpoint.tensors), unfinished / _TENSORS)
            text = json.dumps({"step": checkpoint.step, **checkpoint.state}, allow_nan=False)
            (unfinished / STATE_NAME).write_text(text, encoding="utf-8")
        for _, _, older in self.stored()[:-1]:
            shutil.rmtree(older, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest that can be read; None before the first."""
        found = (read_checkpoint(place, step) for _, step, place in reversed(self.stored()))
        return next((checkpoint for checkpoint in found if checkpoint is not None), None)

    def stored(self) -> list[tuple[int, int, Path]]:
        """(token, step, directory), the oldest first."""
        if not self._directory.is_dir():
            return []
        found = ((NAME.fullmatch(path.name), path) for path in self._directory.iterdir())
        return sorted((int(match[1]), int(match[2]), path) for match, path in found if match is not None)

    def _drop_unfinished(self) -> None:
        """What attempts before this one were writing when they were killed."""
        for path in self._directory.glob(f"{UNFINISHED}*"):
            match = _UNFINISHED_NAME.fullmatch(path.name)
            if match is not None and int(match[1]) < self._token:
                shutil.rmtree(path, ignore_errors=True)


def read_checkpoint(place: Path, step: int) -> Checkpoint | None:
    """The one that lies there; None where it can't be read: another worker is removing it."""
    try:
        state = json.loads((place / STATE_NAME).read_text(encoding="utf-8"))
        return Checkpoint(step, load_file(place / _TENSORS), state)
    except (OSError, ValueError, SafetensorError):
        return None


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
