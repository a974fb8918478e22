"""Ten optimizer steps beside TRL's SFTTrainer: the same rows, order and initial weights, fp32, no dropout."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from server.model.base.weights import BaseModel
from server.training.trainer import BETAS, EPSILON
from tests.server.training.data.rows_kit import distance, peft_model, weights_of
from tests.server.training.loop.test_against_peft import SPEC, Watched, http_examples, our_steps, texts

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def test_ten_steps_are_trls(tiny_base: BaseModel, tiny_base_dir: Path, tmp_path: Path) -> None:
    """TRL tokenizes the rows, masks their prompts, and takes the steps."""
    tuned = peft_model(tiny_base_dir, r=8, lora_alpha=16)
    examples = http_examples(tiny_base)
    trainable = Watched(tiny_base, weights_of(tuned))
    ours = our_steps(trainable, examples)

    order = [row for batch in trainable.batches for row in batch]
    rows = [dict(zip(("prompt", "completion"), pair, strict=True)) for pair in texts(len(examples))]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=len(trainable.batches),
        per_device_train_batch_size=SPEC.batch_size,
        train_sampling_strategy="sequential",
        learning_rate=SPEC.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=SPEC.weight_decay,
        max_grad_norm=SPEC.max_grad_norm,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_length=SPEC.max_length,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL, about what is experimental
        trainer = trl.SFTTrainer(
            model=tuned,
            args=settings,
            train_dataset=datasets.Dataset.from_list([rows[row] for row in order]),
            processing_class=AutoTokenizer.from_pretrained(tiny_base_dir),
        )
        trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [tuple(ids) for ids in trainer.train_dataset["input_ids"]] == [examples[row].token_ids for row in order]
    assert losses == pytest.approx(ours.losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.01, "so much was learnt that a difference could show"
    assert distance(ours.weights, weights_of(tuned)) <= 1e-2
