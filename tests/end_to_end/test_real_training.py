"""Jobs on the real base: an adapter that memorizes its rows, and a fully fine-tuned model."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from server.model.base.source import resolve_base
from server.model.base.weights import load_base
from server.model.smollm import NoAdapters
from server.training.packed import PackedAttention
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import code_rows, get, submit, succeeded
from tests.kits.oracles.hugging_face import load_reference, logits
from tests.server.training.data.rows_kit import model_of
from tests.stress.overfit import check, overfit

pytestmark = pytest.mark.real

Encoded = tuple[list[int], int]
"""A row's tokens, and the number of its prompt's tokens."""


@pytest.mark.thorough  # in make test, the README's examples train the real base
def test_real_base_memorizes_codes(trainer: ServerProcess) -> None:
    """A few codes, which need more epochs; `python -m tests.stress.overfit` trains on all."""
    check(overfit(trainer, num_codes=12, epochs=24))


@pytest.mark.thorough  # in make test, the README trains on these rows, and test_attempt.py trains a worse version
def test_the_readmes_facts_on_the_real_base(trainer: ServerProcess) -> None:
    """With early stopping, which once kept step 4 of 48 by the loss of three rows; then a bad job of the name."""
    path = Path(__file__).parent.parent.parent / "examples" / "http-codes.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    training: dict[str, object] = {"epochs": 12, "eval_steps": 4, "early_stopping_patience": 3}
    body: dict[str, object] = {"name": "readmes", "data": rows, "lora": {"rank": 8}}
    good = succeeded(trainer, submit(trainer, **body, training=training), 300)
    report = get(trainer, f"/train/{good['id']}/report")
    num_rows = report["recall"]["num_rows"]
    assert num_rows == good["data"]["rows"] == len(rows) - good["data"]["validation_rows"] > 20
    assert report["recall"]["num_right"] == {"base": 0, "tuned": num_rows, "latest": None, "parent": None}
    assert report["kept_step"] == report["steps"] == 48
    assert report["comparisons"]["base"]["verdict"] == "better"
    events = get(trainer, f"/train/{good['id']}/events")
    samples = {event["data"]["step"]: event["data"]["samples"] for event in events if "samples" in event["data"]}
    assert list(samples) == [12, 24, 36, 48]
    (sample, *_) = samples[48]
    assert {"prompt": sample["prompt"], "completion": sample["wanted"]} in rows
    assert trainer.texts([sample["prompt"]], adapter="readmes", max_tokens=16)[0].startswith(sample["tuned"])
    assert sample["base"] != sample["tuned"]
    answers = trainer.texts([row["prompt"] for row in rows], adapter="readmes", max_tokens=16)
    right = [answer.strip() == row["completion"].strip() for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) >= num_rows

    training = {"epochs": 1, "learning_rate": 1e-4}
    bad = succeeded(trainer, submit(trainer, **body, training=training), 300)
    report = get(trainer, f"/train/{bad['id']}/report")
    assert report["comparisons"]["latest"]["verdict"] == "worse"
    assert (bad["adapter"]["moves_latest"], get(trainer, "/adapters/readmes")["latest"]) == (False, 1)
    gated = succeeded(trainer, submit(trainer, **body, training=training, publish_if="improves_latest"), 300)
    assert gated["adapter"] is None


@pytest.mark.thorough  # in make test a tiny base is tuned so: test_job_files.py
def test_full_fine_tuning_leaves_a_model_and_no_adapter_on_the_real_base(
    trainer: ServerProcess, tmp_path: Path
) -> None:
    rows = code_rows(8)
    training = {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-4, "max_length": 32}
    body = {"name": "whole", "method": "full", "data": rows, "validation": rows, "training": training}
    job = succeeded(trainer, submit(trainer, **body), 300)
    assert job["adapter"] is None
    assert trainer.client.get("/adapters/whole").status_code == 404
    report = get(trainer, f"/train/{job['id']}/report")
    measured = report["evaluation"]
    assert measured["tuned"]["loss"] < 0.5 * measured["base"]["loss"]
    assert report["trainable_share"] == 1.0

    directory = download(trainer, job["id"], tmp_path / "whole")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    encoded = []
    for row in rows:
        prompt, completion = (tokenizer.encode(row[name]) for name in ("prompt", "completion"))
        encoded.append(([*prompt, *completion, tokenizer.eos_token_id], len(prompt)))
    reference = load_reference(directory)
    rows_of_logits = [logits(reference, tokens) for tokens, _ in encoded]
    loss = mean_loss(rows_of_logits, encoded)
    assert loss == pytest.approx(measured["tuned"]["loss"], abs=0.03)  # measured in bf16
    assert measured["base"]["loss"] - loss > 10 * 0.03

    served = load_base(resolve_base(str(directory), tmp_path), torch.float32)
    model = model_of(served)
    for expected, (tokens, _) in zip(rows_of_logits, encoded, strict=True):
        attention = PackedAttention([len(tokens)], model.device)
        with torch.inference_mode():
            hidden = model.forward(torch.tensor(tokens), attention.positions, attention, NoAdapters())
            torch.testing.assert_close(model.logits(hidden), expected, atol=2e-3, rtol=0)


def download(server: ServerProcess, job_id: str, directory: Path) -> Path:
    """Unpack the job's model into the new `directory`."""
    response = server.client.get(f"/train/{job_id}/download")
    assert response.status_code == 200, response.text
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        archive.extractall(directory)
    return directory


def mean_loss(rows: Sequence[torch.Tensor], encoded: Sequence[Encoded]) -> float:
    """Return nats per token after each row's prompt."""
    losses = []
    for row, (tokens, num_prompt) in zip(rows, encoded, strict=True):
        targets = torch.tensor(tokens[num_prompt:])
        losses.append(torch.nn.functional.cross_entropy(row[num_prompt - 1 : -1], targets, reduction="none"))
    return float(torch.cat(losses).mean())
