"""A stand-in for CUDA graphs on the CPU, which refuses what a capture on a GPU would refuse.

While work is captured, nothing is computed: launches and the operations of `_RECORDED` are recorded. A capture may
neither allocate, nor wait for the device, nor read from it: `NotCapturable` is raised. At a replay the work runs
in Python once more, only to record it: if a graph of this step would differ from the captured one in a kernel, a
grid, a shape or an address, `NotCapturable` is raised, too. Then the recorded launches are computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from server.model.cuda.variants import Variant
from tests.kits.kernels import Launch

_RECORDED = {"aten::index_select"}
"""Operations that write to a given tensor, and allocate nothing on a GPU either."""
_WAITS: tuple[tuple[object, str], ...] = (
    (torch.cuda, "synchronize"),
    *((kind, name) for kind in (torch.cuda.Stream, torch.cuda.Event) for name in ("synchronize", "query")),
)
"""What asks the device whether work is done. CUDA refuses it during a capture."""
_READS = {"tolist", "item", "numpy", "cpu", "to", "pin_memory", "__bool__", "__int__", "__float__", "__index__"}

Entry = tuple[object, tuple[int, ...], tuple[torch.Tensor, ...], Callable[[], object]]
"""A kernel or operation, its grid, its tensors, and what computes it."""


class NotCapturable(RuntimeError):
    """What a graph can't contain."""


class CapturingLaunch:
    """Launches with `run`; `capture` makes graphs of these launches."""

    def __init__(self, run: Launch) -> None:
        self._run = run
        self._entries: list[Entry] | None = None
        self.graph_sizes: list[int] = []  # launches of each graph
        self.num_replays = 0

    def launch(self, variant: Variant, grid: tuple[int, ...], tensors: Sequence[torch.Tensor]) -> None:
        if self._entries is None:
            self._run(variant, grid, tensors)
        else:
            self._entries.append((variant, grid, tuple(tensors), lambda: self._run(variant, grid, tensors)))

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        captured = self._record(work)
        self.graph_sizes.append(len(captured))

        def replay() -> None:
            found = [_key(entry) for entry in self._record(work)]
            for number, entry in enumerate(captured):
                if number >= len(found) or found[number] != _key(entry):
                    raise NotCapturable(f"launch {number} is another one now than when it was captured")
            if len(found) > len(captured):
                raise NotCapturable("there are more launches now than when they were captured")
            self.num_replays += 1
            for entry in captured:
                entry[3]()

        return replay

    def _record(self, work: Callable[[], object]) -> list[Entry]:
        with self._recording() as entries:
            work()
        return entries

    @contextmanager
    def _recording(self) -> Iterator[list[Entry]]:
        assert self._entries is None
        self._entries = []
        try:
            with ExitStack() as stack:
                for owner, name in _WAITS:
                    stack.enter_context(patch.object(owner, name, _refuser(name)))
                stack.enter_context(_NoReads())
                stack.enter_context(_NoAllocations(self._entries))
                yield self._entries
        finally:
            self._entries = None


def _key(entry: Entry) -> tuple[object, ...]:
    kernel, grid, tensors, _ = entry
    return kernel, grid, *((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors)


def _refuser(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object) -> NoReturn:
        raise NotCapturable(f"{name} waits for the device")

    return refuse


class _NoReads(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _READS:
            raise NotCapturable(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


class _NoAllocations(TorchDispatchMode):
    def __init__(self, entries: list[Entry]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._entries = entries

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _RECORDED and "out" in kwargs:
            tensors = tuple(one for one in (*args, kwargs["out"]) if isinstance(one, torch.Tensor))
            self._entries.append((name, (), tensors, lambda: func(*args, **kwargs)))
            return kwargs["out"]
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        if alias is None:
            raise NotCapturable(f"{name} allocates or waits")
        if alias.is_write:
            raise NotCapturable(f"{name} isn't known to be capturable")
        return func(*args, **kwargs)  # a view
