"""A few optimizer steps over given rows, ours or PEFT's, each in a process of its own.

A fresh process has its own peak memory and no other's warm caches. Both sides train LoRA r=16 on all seven linear
modules, or every weight, with AdamW in bf16, over the same token ids; every token but a row's first counts. The
peer is run as fast as it goes: adapters in bf16 (`autocast_adapter_dtype=False`), the fused optimizer, and rows
padded to the batch's longest alone.
"""

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from server.allocator import keep_freed_memory
from server.model.native.load import find_library
from server.model.weights import load_base
from server.training.examples import Example
from server.training.init import initial_weights
from server.training.report import peak_memory_bytes
from server.training.spec import LoraSpec, Method, TrainingSpec
from server.training.trainables import TrainableModel, TrainableRows, trainable_rows
from server.training.trainer import Trainer, shuffled

RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-4
IGNORED = -100  # what transformers doesn't count
Side = Literal["ours", "peer"]
Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Run:
    """One side's part of a round. The first step warms up and isn't timed."""

    method: Method
    rows: Rows  # token ids
    batch_size: int
    base: Path  # ours: a converted base; the peer's: a Hugging Face directory
    threads: int
    native: Path | None = None  # ours: where native code is compiled to; None: torch's


@dataclass(frozen=True)
class Measured:
    tokens_per_second: float  # of rows, without padding
    peak_rss: int  # bytes
    loss: float  # of the first step, whose rows are the same for both sides


def measure(side: Side, run: Run) -> Measured:
    """In a new process. RuntimeError with its traceback where it fails."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(side, run, sender), daemon=True)
    process.start()
    sender.close()
    try:
        found: object = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{side}: the process died") from None
    finally:
        process.join()
        receiver.close()
    if not isinstance(found, Measured):
        raise RuntimeError(f"{side} failed:\n{found}")
    return found


def _child(side: Side, run: Run, connection: Connection) -> None:
    try:
        torch.set_num_threads(run.threads)
        connection.send(_ours(run) if side == "ours" else _peer(run))
    except Exception:
        connection.send(traceback.format_exc())


def _ours(run: Run) -> Measured:
    keep_freed_memory()  # as a job's process does
    base = load_base(run.base, torch.bfloat16)
    longest = max(map(len, run.rows))
    trainable: TrainableModel | TrainableRows
    if run.method == "full":
        trainable = TrainableModel(base, max_length=longest)
    else:
        start, _ = initial_weights(LoraSpec(rank=RANK, alpha=ALPHA), base, seed=0)
        library = find_library(base, [run.native], print) if run.native else None
        trainable = trainable_rows(base, start, None, max_length=longest, dropout=0.0, library=library)
    examples = [Example(tuple(row), (False,) + (True,) * (len(row) - 1)) for row in run.rows]
    spec = TrainingSpec(
        epochs=1,
        learning_rate=LEARNING_RATE,
        batch_size=run.batch_size,
        max_length=longest,
        schedule="constant",
        warmup_ratio=0.0,
    )
    trainer = Trainer(trainable, examples, spec)
    steps = [trainer.run_step() for _ in range(trainer.total_steps)]
    timed = steps[1:]
    speed = sum(step.num_tokens for step in timed) / sum(step.seconds for step in timed)
    return Measured(speed, peak_memory_bytes(base.device), steps[0].loss)


def _peer(run: Run) -> Measured:
    warnings.simplefilter("ignore")
    step = _peer_step(run)
    order = shuffled(len(run.rows), TrainingSpec().seed, epoch=0)
    batches = [
        [run.rows[row] for row in order[start : start + run.batch_size]]
        for start in range(0, len(order), run.batch_size)
    ]
    counts = [sum(map(len, batch)) for batch in batches]
    losses, seconds = [], []
    for batch in batches:
        started = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - started)
    speed = sum(counts[1:]) / sum(seconds[1:])
    return Measured(speed, peak_memory_bytes(torch.device("cpu")), losses[0])


def _peer_step(run: Run) -> Callable[[Rows], float]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.bfloat16)
    base.config.use_cache = False
    model: torch.nn.Module = base
    if run.method == "lora":
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=modules)
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(batch: Rows) -> float:
        inputs = _padded(batch)
        loss: torch.Tensor = model(**inputs).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _padded(batch: Rows) -> dict[str, torch.Tensor]:
    """A batch as transformers takes it; rows of one length need no mask, which is faster."""
    longest = max(map(len, batch))
    token_ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    inputs = {"input_ids": token_ids, "labels": token_ids.masked_fill(mask == 0, IGNORED)}
    return inputs if bool(mask.all()) else inputs | {"attention_mask": mask}
