"""Training peer: transformers, with PEFT for adapters, in their fastest configurations.

Adapters have the base's dtype (`autocast_adapter_dtype=False`), the optimizer is fused, and rows are padded to the
batch's longest, as by collators. Alternatives are packing and compiling.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from server.training.spec import Method

RANK, ALPHA = 16, 32
LEARNING_RATE = 1e-4
IGNORED = -100  # the label that transformers ignores
Rows = Sequence[Sequence[int]]
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PeerSide:
    """A configuration of the peer."""

    packs: bool = False
    compiles: bool = False


EAGER, PACKED, COMPILED = "peer", "peer, packing", "peer, compiled"
PEERS = {EAGER: PeerSide(), PACKED: PeerSide(packs=True), COMPILED: PeerSide(compiles=True)}


class Peer:
    """A model and its optimizer."""

    def __init__(
        self, side: PeerSide, base: Path, method: Method, dtype: torch.dtype, *, longest: int, device: torch.device
    ) -> None:
        """Load the model. `longest` is the length of the longest row of the run: a compiler needs it, and pads all
        rows to it."""
        self._side = side
        self._longest = longest
        self._device = device
        self._model = load(base, method, dtype).to(device)
        self._trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        if side.compiles:
            self._model = cast(torch.nn.Module, torch.compile(self._model, dynamic=False))

    def warmed_up(self) -> None:
        """Turn any further compilation into an error."""
        if self._side.compiles:
            torch.compiler.set_stance("fail_on_recompile")

    def step(self, batch: Rows) -> float:
        """Take one optimizer step; return its loss in nats per counted token."""
        inputs = {name: tensor.to(self._device) for name, tensor in self._inputs(batch).items()}
        loss: torch.Tensor = self._model(**inputs).loss
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
    """Load the model in `dtype` for training, with adapters of r=16 on all seven linear modules if wanted."""
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
    """Return (rows, length) as a collator does. Rows of exactly that length need no mask, which is faster."""
    token_ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
    inputs = {"input_ids": token_ids, "labels": token_ids.masked_fill(mask == 0, IGNORED)}
    return inputs if bool(mask.all()) else inputs | {"attention_mask": mask}


def packed(batch: Rows) -> Inputs:
    """Return (1, tokens), the rows one after the other. transformers separates their attention where positions
    restart at 0."""
    token_ids = [token for row in batch for token in row]
    labels = [label for row in batch for label in (IGNORED, *row[1:])]  # no row predicts the start of the next
    positions = [position for row in batch for position in range(len(row))]
    return {
        "input_ids": torch.tensor([token_ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }
