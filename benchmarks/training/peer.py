"""The peer of training: transformers, and PEFT where adapters are trained, as fast as they go.

Adapters in the precision of the base (`autocast_adapter_dtype=False`), the fused optimizer, rows padded to the
batch's longest alone, as collators do; or packed, or compiled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from server.training.spec import Method

RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-4
IGNORED = -100  # what transformers doesn't count
Rows = Sequence[Sequence[int]]
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PeerSide:
    """A way to run it."""

    packs: bool = False
    compiles: bool = False


EAGER, PACKED, COMPILED = "peer", "peer, packing", "peer, compiled"
PEERS = {EAGER: PeerSide(), PACKED: PeerSide(packs=True), COMPILED: PeerSide(compiles=True)}


class Peer:
    """A model and its optimizer."""

    def __init__(self, side: PeerSide, base: Path, method: Method, dtype: torch.dtype, *, longest: int) -> None:
        """`longest` is that of all rows to come: under a compiler, which has to know it, all are padded to it."""
        self._side = side
        self._longest = longest
        self._model = load(base, method, dtype)
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        if side.compiles:
            self._model = cast(torch.nn.Module, torch.compile(self._model, dynamic=False))

    def warmed_up(self) -> None:
        """From here on compiling is an error."""
        if self._side.compiles:
            torch.compiler.set_stance("fail_on_recompile")

    def step(self, batch: Rows) -> float:
        """One optimizer step; its loss, in nats per counted token."""
        loss: torch.Tensor = self._model(**self._inputs(batch)).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def _inputs(self, batch: Rows) -> Inputs:
        if self._side.packs:
            return packed(batch)
        return padded(batch, self._longest if self._side.compiles else max(map(len, batch)))


def load(base: Path, method: Method, dtype: torch.dtype) -> torch.nn.Module:
    """The model in `dtype`, ready to be trained; its adapters r=16 on all seven linear modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.config.use_cache = False
    if method == "full":
        return cast(torch.nn.Module, model.train())
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=modules)
    prepare = cast("Callable[..., torch.nn.Module]", get_peft_model)
    return prepare(model, config, autocast_adapter_dtype=False).train()


def padded(batch: Rows, length: int) -> Inputs:
    """(rows, length), as a collator makes it; rows of that very length need no mask, which is faster."""
    token_ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
    inputs = {"input_ids": token_ids, "labels": token_ids.masked_fill(mask == 0, IGNORED)}
    return inputs if bool(mask.all()) else inputs | {"attention_mask": mask}


def packed(batch: Rows) -> Inputs:
    """(1, tokens): one row after the other. transformers keeps attention apart where positions begin anew."""
    token_ids = [token for row in batch for token in row]
    labels = [label for row in batch for label in (IGNORED, *row[1:])]  # no row foretells the next one's start
    positions = [position for row in batch for position in range(len(row))]
    return {
        "input_ids": torch.tensor([token_ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }
