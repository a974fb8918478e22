"""The choice between the Triton kernels and torch on a GPU. The kernels' torch forms run here, on the CPU."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from server.config import Settings
from server.engine import cuda_backend, cuda_graphs
from server.engine.backend import Backend
from server.engine.cuda_backend import CudaBackend
from server.engine.engine import EngineConfig
from server.model.base.weights import BaseModel, load_base
from server.model.cuda.variants import Variant
from server.serve import engine
from tests.kits.engines import build_engine
from tests.kits.fake_gpu.card import Card
from tests.kits.fake_gpu.cuda import fake_cuda, on_card
from tests.kits.kernels import Launch, in_torch
from tests.server.model.cuda.bases import two_layers

LENGTH = 320


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(two_layers(tmp_path_factory.mktemp("base")).directory, torch.bfloat16)


def chosen(base: BaseModel, **settings: object) -> tuple[Backend, list[str]]:
    """Return the backend that a base on a GPU would get, and what the start says."""
    said: list[str] = []
    given = Settings.model_validate({"home": Path("unused"), "device": "cuda", **settings})
    return engine._gpu_backend(given, base, LENGTH, 4, said.append), said


def replaced_launch(monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    """Replace Triton's launches and CUDA's graphs, which need a GPU."""

    def capture(work: Callable[[], object]) -> Callable[[], object]:
        return work

    monkeypatch.setattr(cuda_backend, "CudaBackend", partial(CudaBackend, launch=launch))
    monkeypatch.setattr(cuda_graphs, "capture_on_gpu", lambda device: capture)


def wrong_swiglu() -> Launch:
    """Return a launch whose SwiGLU is 1.5 times as large as it should be."""
    right = in_torch()

    def launch(variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
        right(variant, grid, tensors)
        if variant.kernel.__name__ == "swiglu":
            tensors[1].mul_(1.5)

    return launch


def test_the_kernels_serve_if_they_answer_as_torch_does(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced_launch(monkeypatch, in_torch())
    backend, said = chosen(base)
    assert isinstance(backend, CudaBackend)
    assert not any("torch serves" in reason for reason in backend.fallbacks)
    assert len(said) == 1


def test_torch_serves_if_a_kernel_is_wrong(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced_launch(monkeypatch, wrong_swiglu())
    backend, _ = chosen(base)
    assert backend.name == "torch"
    assert backend.fallbacks[0].startswith("torch serves: answers differ from torch's: base: ")


def test_the_command_compares_the_kernels_though_torch_would_serve(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced_launch(monkeypatch, wrong_swiglu())
    monkeypatch.setattr(BaseModel, "device", torch.device("cuda"))
    settings = Settings.model_validate({"home": Path("unused"), "max_model_len": LENGTH, "max_num_seqs": 4})
    backend, found = engine.self_check(settings, base, lambda text: None)
    assert backend.name == "cuda"
    assert found.beyond.startswith("base: ")


def test_bits_that_depend_on_the_batch_are_no_more_claimed(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of the torch forms do. Then nothing is drafted."""
    replaced_launch(monkeypatch, in_torch())
    backend, _ = chosen(base)
    assert isinstance(backend, CudaBackend)
    assert not backend.is_batch_invariant
    assert ["bits depend on the batch" in reason for reason in backend.fallbacks] == [True]
    served = build_engine(base, other=backend, max_model_len=LENGTH)
    assert not served.speculator._is_on
    assert served.scheduler._prompt_room is None, "chunks may end anywhere"
    assert served.stats.fallbacks == frozenset(backend.fallbacks)
    served.close()


def test_torch_serves_if_a_kernel_cannot_be_launched(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    replaced_launch(monkeypatch, fail)
    backend, _ = chosen(base)
    assert backend.name == "torch"
    assert backend.fallbacks[0].startswith("torch serves: the self-check failed (")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("settings", None),
        ("dtype", "the kernels compute in bf16, not in float32"),
        ("triton", "triton isn't installed"),
        ("sizes", "hidden_size 96 is no multiple of 64"),
    ],
)
def test_torch_serves_without_a_check_if_the_kernels_cannot(
    case: str, reason: str | None, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "dtype":
        base = load_base(base.directory, torch.float32)
    if case == "triton":
        monkeypatch.setattr(engine, "find_spec", lambda name: None)
    if case == "sizes":
        monkeypatch.setattr("server.model.cuda.variants.why_not", lambda config: reason)
    backend, said = chosen(base, native=case != "settings")
    assert backend.name == "torch"
    assert backend.fallbacks == said == ([] if reason is None else [f"torch serves: {reason}"])


def test_the_key_value_cache_leaves_room_for_graphs(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"home": Path("unused"), "device": "cuda", "max_num_seqs": 64})
    sizes: list[EngineConfig] = []
    for name in ("triton", "nothing"):
        monkeypatch.setattr(engine, "find_spec", lambda _, name=name: name if name == "triton" else None)
        with fake_cuda(Card(total_bytes=3 << 30, free_bytes=int(2.8 * (1 << 30)))):
            sizes.append(engine._engine_config(settings, on_card(base), 512))
    with_graphs, without = (size.kv_cache_bytes + size.adapter_cache_bytes for size in sizes)
    assert without - with_graphs == engine._graph_bytes(base, 64, 512) > 1 << 20
