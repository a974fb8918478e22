"""A job's rows on disk: they come back as they were, and belong to the base that they were tokenized for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from server.model.base.weights import BaseModel
from server.training.encoding import Example, Examples, Reference
from server.training.job_data import DATA_NAME, AnotherBase, JobData
from tests.server.training.reports.report_kit import FOUND

EXAMPLES = [Example((5, 6, 7), (False, True, True)), Example((8, 9), (False, True))]
REFERENCES = [Reference((5, 6), " täglich", 3), Reference((), "", 0)]


@pytest.mark.parametrize("has_validation", [True, False])
def test_job_data_round_trips(tmp_path: Path, has_validation: bool) -> None:
    validation = Examples(EXAMPLES[1:]) if has_validation else None
    data = JobData(Examples(EXAMPLES), validation, REFERENCES, FOUND.data, "ab" * 32)
    data.save(tmp_path / "job")
    found = JobData.load(tmp_path / "job")
    assert list(found.train) == EXAMPLES
    assert (None if found.validation is None else list(found.validation)) == (
        EXAMPLES[1:] if has_validation else None
    )
    assert (found.references, found.facts, found.base_digest) == (REFERENCES, FOUND.data, "ab" * 32)


def test_job_data_of_an_older_release_is_read(tmp_path: Path) -> None:
    data = JobData(Examples(EXAMPLES), None, REFERENCES, FOUND.data, "ab" * 32)
    data.save(tmp_path / "job")
    document = json.loads((tmp_path / "job" / DATA_NAME).read_text())
    del document["facts"]["kinds"]
    (tmp_path / "job" / DATA_NAME).write_text(json.dumps(document))
    assert JobData.load(tmp_path / "job").facts == replace(FOUND.data, kinds={})


def test_rows_of_another_base_are_refused(tiny_base: BaseModel) -> None:
    data = JobData(Examples(EXAMPLES), None, [], FOUND.data, tiny_base.digest)
    data.check_base(tiny_base)
    with pytest.raises(AnotherBase, match="SMOLORA_MODEL") as caught:
        replace(data, base_digest="ab" * 32).check_base(tiny_base)
    assert "abababababab" in str(caught.value)
    assert tiny_base.digest[:12] in str(caught.value)
