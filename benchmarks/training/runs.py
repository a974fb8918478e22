"""A few optimizer steps over given rows, by our code or a peer, each run in its own process.

A fresh process has its own peak memory and no warm caches. All sides train LoRA r=16 on all seven linear modules,
or every weight, with AdamW, on the same token ids and with the same allocator settings. Every token except a row's
first counts.
"""

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.allocation import keeps_freed_memory
from benchmarks.measure import Figure
from benchmarks.training.peer import ALPHA, LEARNING_RATE, PEERS, RANK, Peer, PeerSide
from server.model.base.weights import load_base
from server.model.native.load import find_library
from server.system.memory import keep_freed_memory
from server.training.encoding import Example
from server.training.report import peak_memory_bytes
from server.training.spec import LoraSpec, Method, TrainingSpec
from server.training.trainables import TrainableModel, TrainableRows, trainable_rows
from server.training.trained_rows import initial_weights
from server.training.trainer import Trainer, shuffled

WARM_UP = 3
"""Untimed steps: a compiler is done after them."""
NATIVE, TORCH = "smolora", "smolora in torch"
Side = str
"""NATIVE (on a GPU: what runs there by default), TORCH, or a peer's side."""


@dataclass(frozen=True)
class Run:
    """One side's part of a round."""

    method: Method
    rows: Sequence[Sequence[int]]  # token ids
    batch_size: int
    converted: Path  # the base, for our code
    hugging_face: Path  # the base, for peers
    threads: int
    torch_dtype: torch.dtype  # for sides computed in torch
    native: Path  # build folder of native code
    compiled: Path  # cache of torch.compile, for the next process
    device: str = "cpu"


@dataclass(frozen=True)
class Measured:
    tokens_per_second: Figure  # of rows, without padding
    peak_rss: int  # bytes
    loss: Figure  # of the first step, whose rows are the same for all sides
    warm_up: Figure  # seconds of the untimed steps, including compiling
    native: bool = False  # computed by our native code
    keeps_memory: bool = True  # with our allocator settings


def measure(side: Side, run: Run) -> Measured:
    """Measure in a new process. Raise RuntimeError with its traceback if it fails."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(side, run, sender))  # no daemon: compilers have children
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
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run.compiled)
        keep_freed_memory()  # as in a job's process
        torch.set_num_threads(run.threads)
        measured = _peer(PEERS[side], run) if side in PEERS else _ours(run, native=side == NATIVE)
        connection.send(replace(measured, keeps_memory=keeps_freed_memory()))
    except Exception:
        connection.send(traceback.format_exc())


def _ours(run: Run, *, native: bool) -> Measured:
    base = load_base(run.converted, torch.bfloat16 if native else run.torch_dtype, run.device)
    longest = max(map(len, run.rows))
    trainable: TrainableModel | TrainableRows
    library = find_library(base, run.native, print) if native else None
    if run.method == "full":
        trainable = TrainableModel(base, max_length=longest, library=library)
    else:
        start, _ = initial_weights(LoraSpec(rank=RANK, alpha=ALPHA), base, seed=0)
        trainable = trainable_rows(base, start, None, max_length=longest, dropout=0.0, library=library)
        del start  # as a job releases its start adapter after copying it
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
    timed = steps[WARM_UP:]
    speed = sum(step.num_tokens for step in timed) / sum(step.seconds for step in timed)
    warm_up = sum(step.seconds for step in steps[:WARM_UP])
    return Measured(speed, peak_memory_bytes(base.device), steps[0].loss, warm_up, native=library is not None)


def _peer(side: PeerSide, run: Run) -> Measured:
    warnings.simplefilter("ignore")
    longest, device = max(map(len, run.rows)), torch.device(run.device)
    peer = Peer(side, run.hugging_face, run.method, run.torch_dtype, longest=longest, device=device)
    order = shuffled(len(run.rows), TrainingSpec().seed, epoch=0)
    batches = [
        [run.rows[row] for row in order[start : start + run.batch_size]]
        for start in range(0, len(order), run.batch_size)
    ]
    counts = [sum(map(len, batch)) for batch in batches]
    losses, seconds = [], []
    for number, batch in enumerate(batches):
        if number == WARM_UP:
            peer.warmed_up()
        started = time.perf_counter()
        losses.append(peer.step(batch))
        seconds.append(time.perf_counter() - started)
    speed = sum(counts[WARM_UP:]) / sum(seconds[WARM_UP:])
    return Measured(speed, peak_memory_bytes(device), losses[0], sum(seconds[:WARM_UP]))
