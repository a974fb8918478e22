"""The self-check of a backend: sound backends pass, and faults are found."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.native_backend import NativeBackend
from server.engine.sampling import LogitsRow, Sampled
from server.engine.self_check import MAX_LENGTH, check, checked
from server.engine.sequence import Chunk
from server.engine.torch_backend import TorchBackend
from server.errors import StartupError
from server.model.base.weights import BaseModel, load_base
from server.model.smollm import SmolLM
from tests.kits.native import native_model

LENGTH = 400
Fault = Callable[[torch.Tensor], torch.Tensor]


def torch_backend(base: BaseModel) -> TorchBackend:
    return TorchBackend(SmolLM(base.config, base.weights, max_positions=LENGTH))


class Faulty(TorchBackend):
    """A backend with a fault in its hidden states or in its noise."""

    def __init__(self, model: SmolLM, fault: Fault = lambda hidden: hidden, num_more_seeds: int = 0) -> None:
        super().__init__(model)
        self._fault = fault
        self._num_more_seeds = num_more_seeds

    def hidden(self, decodes: Seq[Chunk], prefills: Seq[Chunk]) -> torch.Tensor:
        return self._fault(super().hidden(decodes, prefills))

    def sample(self, hidden: torch.Tensor, rows: Seq[LogitsRow]) -> list[Sampled]:
        more = self._num_more_seeds
        other = [row._replace(params=replace(row.params, seed=row.params.seed + more)) for row in rows]
        return super().sample(hidden, other)


def faulty(base: BaseModel, fault: Fault = lambda hidden: hidden, num_more_seeds: int = 0) -> Faulty:
    return Faulty(SmolLM(base.config, base.weights, max_positions=MAX_LENGTH), fault, num_more_seeds)


def broken(hidden: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("an illegal memory access was encountered")


def test_torch_agrees_with_itself(tiny_base: BaseModel) -> None:
    found = check(tiny_base, torch_backend(tiny_base), torch_backend(tiny_base), LENGTH)
    names = ["base", "cached prefix", "long prompt", "adapter", "blend", "seeded"]
    assert [one.name for one in found.comparisons] == names
    assert not found.beyond
    assert all(one.num >= 16 for one in found.comparisons)


@pytest.mark.parametrize(
    ("fault", "num_more_seeds", "finds"),
    [
        (lambda hidden: 2 * hidden, 0, "base: "),
        (lambda hidden: hidden.roll(1, -1), 0, "base: "),
        (lambda hidden: hidden * float("nan"), 0, ""),
        (lambda hidden: hidden, 1, "seeded: 1 of the answers, margin 0.5"),
        (broken, 0, "the self-check failed (GenerationFailed)"),
    ],
    ids=["a wrong norm", "features in wrong places", "not a number", "other noise", "a crash"],
)
def test_torch_serves_instead_of_a_faulty_backend(
    tiny_base: BaseModel, fault: Fault, num_more_seeds: int, finds: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        served = checked(
            tiny_base,
            lambda: faulty(tiny_base, fault, num_more_seeds),
            lambda: torch_backend(tiny_base),
            LENGTH,
        )
    assert type(served) is TorchBackend
    (reason,) = served.fallbacks
    assert reason.startswith("torch serves: ")
    assert finds in reason
    assert "torch serves, since" in caplog.text


class Lost(torch.Tensor):
    """A tensor on a GPU whose context was lost."""

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")


def test_the_start_fails_if_a_fault_has_made_the_gpu_unusable(tiny_base: BaseModel) -> None:
    weights = replace(tiny_base.weights, final_norm=tiny_base.weights.final_norm.as_subclass(Lost))
    base = replace(tiny_base, weights=weights)
    with pytest.raises(StartupError, match="set SMOLORA_NATIVE=0 to serve by torch"):
        checked(base, lambda: faulty(tiny_base, broken), lambda: torch_backend(tiny_base), LENGTH)


@pytest.mark.real
@pytest.mark.thorough  # test_cli_check.py compares the real base without a fault
def test_a_wrong_rotary_base_is_found_on_the_real_base(base_dir: Path) -> None:
    base = load_base(base_dir, torch.bfloat16)
    config = replace(base.config, rope_theta=1.2 * base.config.rope_theta)
    native = native_model(replace(base, config=config))
    found = check(base, NativeBackend(native), torch_backend(base), LENGTH)
    assert found.beyond
    assert found.is_batch_invariant
