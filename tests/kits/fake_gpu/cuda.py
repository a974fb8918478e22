"""A fake GPU: code runs as on CUDA, on CPU tensors that are marked as being on the card.

Within `fake_cuda()` a tensor that is made on "cuda" or moved there reports that device; its numbers are on the
CPU. An operation that mixes devices raises `Mixed`. The card counts a thread's kernels (operations that compute
or copy, but not views and empty tensors) and its waits, each of which blocks the thread until all earlier work of
the card is done. A side stream's copies into tensors of the main stream appear after a wait for their event.
`TooEarly` is raised if a side stream doesn't wait for the main stream first. Threads of pools use the card, too.

Speed, memory, a GPU's rounding and waits within its kernels aren't modelled.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from server.model.base.weights import LAYER_TENSORS, BaseModel, BaseWeights, LayerWeights
from tests.kits.fake_gpu.card import Card, Counts, Event, Stream, here, on_stream
from tests.kits.fake_gpu.modes import CUDA, Functions, Operations


@contextmanager
def fake_cuda(card: Card | None = None) -> Iterator[Card]:
    """Give this thread, and pools' threads that run its tasks, a fake card."""
    card = card or Card()
    submit = ThreadPoolExecutor.submit

    def submit_with_card(pool: ThreadPoolExecutor, task: Callable[..., Any], /, *a: Any, **k: Any) -> Future[Any]:
        def with_card() -> Any:
            with _speaking_to(card, card.pools):
                return task(*a, **k)

        return submit(pool, with_card)

    with ExitStack() as stack:
        for name, answer in _answers(card).items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", submit_with_card))
        stack.enter_context(_speaking_to(card, card.main))
        yield card


@contextmanager
def _speaking_to(card: Card, counts: Counts) -> Iterator[None]:
    before = here.card, here.counts
    here.card, here.counts = card, counts
    try:
        with Functions(), Operations():  # type: ignore[no-untyped-call]  # torch's own `__init__`
            yield
    finally:
        here.card, here.counts = before


def _answers(card: Card) -> dict[str, Callable[..., Any]]:
    """Return replacements for functions of `torch.cuda`, by name."""

    def capability(device: torch.device | int = 0) -> tuple[int, int]:
        index = device if isinstance(device, int) else device.index or 0
        return card.capabilities[index]

    def set_fraction(fraction: float, device: torch.device | int | None = None) -> None:
        if isinstance(device, torch.device) and device.index is None:
            raise ValueError("Expected a torch.device with a specified index")  # as torch does, here alone
        card.memory_fraction = fraction

    def empty_cache() -> None:
        card.num_emptied += 1

    return {
        "is_available": lambda: bool(card.capabilities),
        "device_count": lambda: len(card.capabilities),
        "current_device": lambda: 0,
        "get_device_properties": lambda device=0: SimpleNamespace(major=capability(device)[0]),
        "get_device_capability": capability,
        "get_device_name": lambda device=None: card.name,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "compute_90"],
        "mem_get_info": lambda device=None: (card.free_bytes, card.total_bytes),
        "max_memory_reserved": lambda device=None: card.reserved_bytes,
        "set_per_process_memory_fraction": set_fraction,
        "get_per_process_memory_fraction": lambda device=None: card.memory_fraction,
        "empty_cache": empty_cache,
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "default_stream": lambda device=None: None,
    }


def on_card(base: BaseModel) -> BaseModel:
    """Return the base with copies of its weights on the card."""
    weights = base.weights
    embed = weights.embed.to(CUDA)
    layers = tuple(
        LayerWeights(*(getattr(layer, name).to(CUDA) for name in LAYER_TENSORS)) for layer in weights.layers
    )
    lm_head = embed if weights.lm_head is weights.embed else weights.lm_head.to(CUDA)
    return replace(base, weights=BaseWeights(embed, layers, weights.final_norm.to(CUDA), lm_head))
