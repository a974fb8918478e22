"""Unfinished checkpoints of killed attempts: gigabytes that nothing else removes."""

from pathlib import Path

import torch

from server.training.checkpoint import Checkpoint, Checkpoints

STEP = Checkpoint(7, {"masters": torch.zeros(3)}, {})


def test_saving_removes_leftovers_of_earlier_attempts(tmp_path: Path) -> None:
    left = (".unfinished-1-3-abc", ".unfinished-1-4-x-y", ".unfinished-3-9-abc", "notes")
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(bytes(100))
    Checkpoints(tmp_path, 2).save(STEP)
    assert {path.name for path in tmp_path.iterdir()} == {".unfinished-3-9-abc", "2-7", "notes"}, (
        "this attempt may have lost the job to the one that writes there"
    )
