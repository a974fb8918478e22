"""The state of a fake card: counts of its work, its streams, and the current thread's view of it."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

_ROOT = str(Path(__file__).parents[3]) + "/"


@dataclass
class Counts:
    """Counts of the work of one kind of threads. Keys of `waits` are the reason and the line of code."""

    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    uploads: Counter[torch.dtype] = field(default_factory=Counter)  # tensors from the host's memory

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    @property
    def num_uploads(self) -> int:
        return self.uploads.total()

    def clear(self) -> None:
        for counter in (self.kernels, self.waits, self.uploads):
            counter.clear()


@dataclass
class Card:
    """A fake card: the work of the thread that made it, the work of pools' threads, and its properties."""

    main: Counts = field(default_factory=Counts)
    pools: Counts = field(default_factory=Counts)
    name: str = "Fake GPU"
    capabilities: tuple[tuple[int, int], ...] = ((9, 0),)  # of each device; the first is the one that is used
    total_bytes: int = 24 << 30
    free_bytes: int = 22 << 30
    reserved_bytes: int = 0  # the maximum so far
    memory_fraction: float = 1.0
    num_emptied: int = 0  # times that freed memory was released
    is_full: bool = False  # no further allocation succeeds
    gate: threading.Event = field(default_factory=threading.Event)  # cleared: copies of side streams don't end

    def __post_init__(self) -> None:
        self.gate.set()


class Stream:
    """Replaces `torch.cuda.Stream`: its copies run when somebody waits for them.

    The main stream is None, and does everything at once.
    """

    def __init__(self, device: object = None) -> None:
        assert here.card is not None
        self._card = here.card
        self._copies: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._knows_main = threading.local()

    @property
    def follows_main(self) -> bool:
        """Return whether this thread's next work comes after all work of the main stream."""
        return getattr(self._knows_main, "value", False)

    def add(self, copy: Callable[[], object]) -> None:
        with self._lock:
            self._copies.append(copy)

    def wait_stream(self, other: "Stream | None") -> None:
        self._knows_main.value = other is None

    def record_event(self, event: "Event") -> "Event":
        event.record(self)
        return event

    def finish(self) -> None:
        assert self._card.gate.wait(30), "the test never lets copies end"
        with self._lock:
            for copy in self._copies:
                copy()
            self._copies.clear()
        self._knows_main.value = False


class Event:
    """Replaces `torch.cuda.Event`."""

    def __init__(self, *, blocking: bool = False) -> None:
        self._stream: Stream | None = None

    def record(self, stream: Stream | None) -> None:
        self._stream = stream

    def synchronize(self) -> None:
        note_wait("event")
        if self._stream is not None:
            self._stream.finish()


class _Here(threading.local):
    """The current thread's card, counts and stream."""

    card: Card | None = None
    counts: Counts | None = None
    stream: Stream | None = None


here = _Here()


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Replaces `torch.cuda.stream`."""
    before, here.stream = here.stream, stream
    try:
        yield
    finally:
        here.stream = before


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return the tensor's storage, or None for a sparse tensor, which has none itself."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def is_on_card(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is on the card, by a mark on its storage."""
    return getattr(storage_of(tensor), "is_on_card", False)


def is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(storage_of(tensor), "is_pinned", False)


def stream_of(tensor: torch.Tensor) -> Stream | None:
    """Return the stream on which the tensor was made."""
    return getattr(storage_of(tensor), "made_on", None)


def mark(tensor: torch.Tensor, *, on_card: bool, pinned: bool = False) -> torch.Tensor:
    """Mark the tensor's device, and return the tensor. Raise torch's OutOfMemoryError if the card is full."""
    if on_card and here.card is not None and here.card.is_full:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    storage = storage_of(tensor)
    if storage is not None:
        vars(storage).update(is_on_card=on_card, is_pinned=pinned, made_on=here.stream)
    return tensor


def note_wait(what: str) -> None:
    """Count a wait of this thread for all earlier work of the card."""
    if here.counts is not None:
        here.counts.waits[what, where()] += 1


def note_upload(source: torch.Tensor, non_blocking: bool) -> None:
    """Count a copy from the host's memory. It is a wait unless it is pinned and non-blocking."""
    if here.counts is not None:
        here.counts.uploads[source.dtype] += 1
    if not (non_blocking and is_pinned(source)):
        note_wait("upload")


def where() -> str:
    """Return the innermost running line of the project's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename.removeprefix(_ROOT)
        if path.startswith(("server/", "adapters/")):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"
