"""A thread's view of the card: torch's modes, which mark tensors, refuse mixed devices and count."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kits.fake_gpu.card import here, is_on_card, mark, note_upload, note_wait, storage_of, stream_of, where

CUDA, CPU = torch.device("cuda"), torch.device("cpu")

_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
_MOVES = {"aten::copy_", "aten::_to_copy", "aten::lift_fresh", "aten::set_"}
_INDEXES = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_NO_KERNEL = {"aten::detach", "aten::lift_fresh", "aten::_local_scalar_dense", "aten::_unsafe_view"}
_Tensor = torch.Tensor

_single: set[Any] = set()  # operations that aren't composed of others


class Mixed(RuntimeError):
    """Tensors of two devices were mixed."""


class TooEarly(RuntimeError):
    """A side stream overwrote what the main stream may still read."""


class Operations(TorchDispatchMode):
    """A mode that sees every operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; asking takes a tenth of each operation's time

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func not in _single:  # composite operations arrive whole
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
            _single.add(func)
        name, computes = _about(func)
        on_card, elsewhere = False, False
        for tensor in _tensors((*args, *kwargs.values())):
            storage = storage_of(tensor)
            if getattr(storage, "is_on_card", False):
                on_card = True
            elif storage is not None and tensor.dim():
                elsewhere = True
        lies_on_card = on_card
        if name in _INDEXES:
            lies_on_card = is_on_card(args[0])
            _check_index(name, lies_on_card, args)
        elif name == "aten::copy_":
            lies_on_card = is_on_card(args[0])
            _check_copy(*args)
        elif on_card and elsewhere and name not in _MOVES:
            raise Mixed(f"{name} at {where()}")
        if on_card:
            _count(func, name, computes, kwargs)
        if name == "aten::copy_" and here.stream is not None and stream_of(args[0]) is not here.stream:
            if not here.stream.follows_main:
                raise TooEarly(f"written at {where()} while the main stream may read it")
            here.stream.add(lambda: func(*args, **kwargs))
            return args[0]
        found = func(*args, **kwargs)
        if lies_on_card:
            for tensor in _tensors(found if isinstance(found, tuple | list) else (found,)):
                if not is_on_card(tensor):
                    mark(tensor, on_card=True)
        return found


def _tensors(values: Iterable[Any]) -> Iterator[_Tensor]:
    for value in values:
        if isinstance(value, _Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _check_index(name: str, lies_on_card: bool, args: tuple[Any, ...]) -> None:
    for index in args[1]:
        if index is None:
            continue
        if is_on_card(index) and not lies_on_card:
            raise Mixed(f"{name} at {where()}: an index on the card")
        if lies_on_card and not is_on_card(index):
            note_upload(index, non_blocking=False)
        if lies_on_card and index.dtype is torch.bool:
            note_wait("boolean index")
    values = args[2] if len(args) > 2 else None
    if isinstance(values, _Tensor) and values.dim() and is_on_card(values) != lies_on_card:
        raise Mixed(f"{name} at {where()}: values of another device")


def _check_copy(to: _Tensor, source: _Tensor, non_blocking: bool = False) -> None:
    if is_on_card(to) and not is_on_card(source):
        note_upload(source, non_blocking)
    elif is_on_card(source) and not is_on_card(to):
        note_wait("download")


@cache
def _about(func: Any) -> tuple[str, bool]:
    """Return an operation's name, and whether it computes anything."""
    name: str = func._schema.name
    returned = func._schema.returns
    alias = returned[0].alias_info if returned else None
    is_view = alias is not None and not alias.is_write
    return name, not (is_view or name in _NO_KERNEL or name.startswith(("aten::empty", "aten::new_empty")))


def _count(func: Any, name: str, computes: bool, kwargs: Mapping[str, Any]) -> None:
    if computes and here.counts is not None:
        here.counts.kernels[name] += 1
    asks_for_size = (
        name == "aten::repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None
    )
    if name in _WAITS or asks_for_size:
        note_wait(name)


_DEVICE_OF = _Tensor.device.__get__
_IS_CUDA_OF = _Tensor.is_cuda.__get__  # type: ignore[attr-defined]  # a descriptor, for all that
_HOSTS = (_Tensor.numpy, _Tensor.__array__, _Tensor.data_ptr)  # only for the host's memory
_ANSWERED = {
    *(_DEVICE_OF, _IS_CUDA_OF, *_HOSTS),
    *(_Tensor.pin_memory, _Tensor.tolist, _Tensor.cpu, _Tensor.to, _Tensor.new_tensor),
}


class Functions(TorchFunctionMode):
    """A mode that reports tensors' devices, and creates tensors "on the card"."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _ANSWERED and "device" not in kwargs and "pin_memory" not in kwargs:  # most calls
            return func(*args, **kwargs)
        kwargs = dict(kwargs)
        if func == _DEVICE_OF:
            return CUDA if is_on_card(args[0]) else CPU
        if func == _IS_CUDA_OF:
            return is_on_card(args[0])
        if func is _Tensor.pin_memory:
            return mark(args[0].clone(), on_card=False, pinned=True)
        if func in _HOSTS and is_on_card(args[0]):
            raise TypeError(f"{func.__name__} of a tensor on the card at {where()}")
        if func is _Tensor.tolist and is_on_card(args[0]):
            note_wait("tolist")
        if func is _Tensor.cpu:
            return _moved(args[0], "cpu")
        if func is _Tensor.to:
            return _moved(*args, **kwargs)
        if func is _Tensor.new_tensor and is_on_card(args[0]):
            found = func(*args, **kwargs)
            note_upload(found, non_blocking=False)
            return mark(found, on_card=True)
        pinned, device = kwargs.pop("pin_memory", False), kwargs.get("device")
        if device is None and not pinned:
            return func(*args, **kwargs)
        found = func(*args, **{**kwargs, "device": CPU})
        on_card = device is not None and torch.device(device).type == "cuda"
        if on_card and func in (torch.tensor, torch.as_tensor):
            note_upload(found, non_blocking=False)
        return mark(found, on_card=on_card, pinned=pinned) if isinstance(found, _Tensor) else found


def _moved(tensor: _Tensor, *to: Any, **kwargs: Any) -> _Tensor:
    """Replace `tensor.to(…)`."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in to:
        if isinstance(value, str | torch.device):
            device = value
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, _Tensor):
            device, dtype = CUDA if is_on_card(value) else CPU, value.dtype
    was_there = is_on_card(tensor)
    goes_there = was_there if device is None else torch.device(device).type == "cuda"
    moves = goes_there != was_there
    found = tensor.to(dtype or tensor.dtype, copy=kwargs.get("copy", False) or moves)
    if moves and goes_there:
        note_upload(tensor, kwargs.get("non_blocking", False))
    elif moves:
        note_wait("download")
    return mark(found, on_card=goes_there) if moves else found
