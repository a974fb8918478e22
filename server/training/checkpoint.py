"""A job's checkpoints. Each is complete or absent, no matter when a process is killed.

    <checkpoints>/<token>-<step>/   state.safetensors   fp32 weights, AdamW's moments, the best weights
                                    state.json          the step, and the run's counters and measurements
    <checkpoints>/.unfinished-...   a checkpoint that is being written

`token` is the fencing token of the worker's claim on the job. If the job is claimed again, the new worker uses
other names than the old one, so neither overwrites the other's files. The newest checkpoint has the highest token,
then the highest step. `save` first removes the unfinished files of killed attempts. After writing the checkpoint,
`save` removes older checkpoints.

With a bucket, each checkpoint is also uploaded, as the copy `checkpoint-<token>-<step>` of the folder `jobs/<id>`.
A worker on another machine can then resume from it.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adapters.errors import BytesUnavailable
from adapters.storage.blobs import Missing
from adapters.storage.copies import Copies, Copy
from adapters.storage.durable import UNFINISHED, new_directory
from server.storage.home import CHECKPOINT_COPY

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket

STATE_NAME = "state.json"
_TENSORS = "state.safetensors"
FILE_NAMES = frozenset({_TENSORS, STATE_NAME})
_NAME = re.compile(r"(\d+)-(\d+)")
_UNFINISHED_NAME = re.compile(rf"{re.escape(UNFINISHED)}(\d+)-\d+-.*")

log = logging.getLogger("smolora.training")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a training run needs to resume. `state` is JSON. No state of a random generator is needed."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, object]


class Checkpoints:
    """One job's checkpoints, in a directory and, if there is one, in a bucket.

    The names of checkpoints that are saved here contain `token`.
    """

    def __init__(self, directory: Path, token: int, bucket: "Bucket | None" = None, job_id: str = "") -> None:
        """`job_id` names the job's folder in the bucket."""
        self._directory = directory
        self._token = token
        self._copies = Copies(None if bucket is None else bucket.under("jobs"), STATE_NAME)
        self._job_id = job_id

    def save(self, checkpoint: Checkpoint) -> None:
        """Store the checkpoint, then remove older ones. If storing fails, raise OSError and leave no files.

        If the bucket can't be reached, the checkpoint stays on this machine, and training continues.
        """
        name = f"{self._token}-{checkpoint.step}"
        if not (place := self._directory / name).exists():  # else this attempt has stored that step already
            self._drop_unfinished()
            with new_directory(place) as unfinished:
                save_file(dict(checkpoint.tensors), unfinished / _TENSORS)
                text = json.dumps({"step": checkpoint.step, **checkpoint.state}, allow_nan=False)
                (unfinished / STATE_NAME).write_text(text, encoding="utf-8")
            for _, _, older in self.stored()[:-1]:
                shutil.rmtree(older, ignore_errors=True)
        try:
            if (self._token, checkpoint.step) not in self._uploaded():
                self._copies.push(self._job_id, place, f"{CHECKPOINT_COPY}{name}")
            uploaded = self._uploaded()
            self._copies.remove(uploaded[key] for key in sorted(uploaded)[:-1])
        except BytesUnavailable:
            log.warning("the checkpoint of step %d stays on this machine alone", checkpoint.step)
        except FileNotFoundError:
            log.warning(
                "the checkpoint of step %d was removed already: another worker has the job", checkpoint.step
            )

    def newest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint of this machine and the bucket, or None if there is none.

        Raise BytesUnavailable if the bucket can't be reached.
        """
        uploaded = self._uploaded()
        here = {(token, step) for token, step, _ in self.stored()}
        for token, step in sorted(here | uploaded.keys(), reverse=True):
            place = self._directory / f"{token}-{step}"
            try:
                if not place.is_dir():
                    copy = uploaded[token, step]
                    with new_directory(place) as unfinished:
                        self._copies.fetch(copy, unfinished)
            except (KeyError, Missing):  # another worker is removing it
                continue
            if (found := _read(place, step)) is not None:
                return found
        return None

    def stored(self) -> list[tuple[int, int, Path]]:
        """Return (token, step, directory) of all checkpoints on this machine, the oldest first."""
        if not self._directory.is_dir():
            return []
        found = ((_NAME.fullmatch(path.name), path) for path in self._directory.iterdir())
        return sorted((int(match[1]), int(match[2]), path) for match, path in found if match is not None)

    def _uploaded(self) -> dict[tuple[int, int], Copy]:
        """Return the complete checkpoints in the bucket, by token and step."""
        found = {}
        for copy in self._copies.whole(self._job_id):
            match = (
                _NAME.fullmatch(copy.id.removeprefix(CHECKPOINT_COPY))
                if copy.id.startswith(CHECKPOINT_COPY)
                else None
            )
            if match is not None:
                found[int(match[1]), int(match[2])] = copy
        return found

    def _drop_unfinished(self) -> None:
        """Remove the unfinished checkpoints of earlier attempts that were killed."""
        for path in self._directory.glob(f"{UNFINISHED}*"):
            match = _UNFINISHED_NAME.fullmatch(path.name)
            if match is not None and int(match[1]) < self._token:
                shutil.rmtree(path, ignore_errors=True)


def _read(place: Path, step: int) -> Checkpoint | None:
    """Return the checkpoint in the directory, or None if it can't be read (another worker may be removing it)."""
    try:
        state = json.loads((place / STATE_NAME).read_text(encoding="utf-8"))
        return Checkpoint(step, load_file(place / _TENSORS), state)
    except (OSError, ValueError, SafetensorError):
        return None
