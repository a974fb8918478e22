"""Packed files: stored adapters in the layout of the memory pools (`RankRows`), which load without conversion.

A packed file (`adapters.store.packed`) is a header page and the result of `RowLayout.pack`. Loading the adapter
checks the header; placing it in the pools reads the rest. The file is written when the adapter is put into the
store, or in the background when the adapter is loaded and has no packed file. A file with another layout or length
is deleted and written again. A load doesn't detect damaged content, but `smolora doctor` does, since it reads the
whole file (`is_damaged`). Some adapters get no packed file (`_is_wanted`). They are placed from their published
form, with the same bits.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from io import FileIO

import torch

from adapters.errors import Unavailable
from adapters.lora import LoraWeights
from adapters.store.packed import Pieces
from adapters.store.store import AdapterStore
from server.model.rank_rows import GROUPS, PackedFile, RowLayout, Stored

FORMAT = 1
"""Increases with every change of `RowLayout.pack`'s result."""
_HEADER = 4096  # bytes; the content begins at a page
_SUM = "sum"  # the header's key for `_sum_of`
_MAX_GROWTH = 4
"""Limit of a packed form's size, as a multiple of the published size. Every layer has as many rows as the largest
rank of any layer, so if an adapter targets only one layer, its packed form is nearly all zeros. Quotas don't count
packed files: the limit keeps a small upload from filling memory and disk."""
_SMALL = 1 << 20
"""A packed form of up to this many bytes is always kept."""

log = logging.getLogger(__name__)


class PackedAdapters:
    """The packed files of one store, for one `RowLayout`. Thread-safe."""

    def __init__(
        self, store: AdapterStore, layout: RowLayout, min_free_bytes: int = 0, max_bytes: int | None = None
    ) -> None:
        """Have the store write a packed file for each adapter that is put into it, if `_is_wanted` returns true.

        `min_free_bytes` must stay free on the disk. `max_bytes` is the capacity of the pools, if known.
        """
        self._store = store
        self._layout = layout
        self._max_bytes = max_bytes
        self._layout_digest = _digest_of(layout)
        self._writing = threading.Lock()
        store.packed.min_free_bytes = min_free_bytes
        store.packed.make = self._wanted_pieces

    def load(self, digest: str) -> Stored:
        """Return the adapter: its packed file, not yet read, or the published weights if it has no packed file.

        The result takes no memory of its own until the adapter is placed in the pools. Raise CorruptAdapter if the
        adapter is damaged.
        """
        try:
            with self._store.packed.open(digest) as file:
                return self._check(digest, file)
        except OSError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            self._store.packed.remove(digest)
        weights = self._store.load(digest)
        # If another packed file is being written now, a later load writes this adapter's.
        if self._is_wanted(digest, weights) and self._writing.acquire(blocking=False):
            args = (digest, weights)
            try:
                threading.Thread(target=self._keep, args=args, name="adapter-packer", daemon=True).start()
            except RuntimeError:  # no thread can be started
                self._writing.release()
        return weights

    def _check(self, digest: str, file: FileIO) -> PackedFile:
        page = file.read(_HEADER)
        header = json.loads(page)
        if (header["layout"], header["digest"]) != (self._layout_digest, digest):
            raise ValueError("another layout or adapter")
        if _SUM not in header:
            raise ValueError("no checksum")
        needs = self._layout.needs(header["ranks"])
        if os.fstat(file.fileno()).st_size != _HEADER + self._layout.num_bytes(needs):
            raise ValueError("another length")
        return PackedFile(needs, partial(self._read, digest, page))

    def _read(self, digest: str, page: bytes, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with the file's content after the header `page`.

        If that fails, delete the file and raise Unavailable.
        """
        try:
            with self._store.packed.open(digest) as file:
                if file.read(_HEADER) != page:
                    raise OSError("the file was replaced")
                for buffer in buffers:
                    _fill(buffer, file)
        except OSError as error:
            log.warning("can't read %s: %s", digest[:12], error)
            self._store.packed.remove(digest)
            raise Unavailable(
                "an adapter of this request can't be read from the disk now; try it again"
            ) from error

    def _is_wanted(self, digest: str, weights: LoraWeights) -> bool:
        """Return whether to write a packed file of the adapter. This doesn't create the packed form."""
        num_bytes = self._layout.num_bytes(self._layout.needs_of(weights))
        published = sum(module.a.nbytes + module.b.nbytes for module in weights.modules.values())
        if num_bytes > max(_MAX_GROWTH * published, _SMALL):
            return False
        if self._max_bytes is not None and num_bytes > self._max_bytes:  # it is never placed
            return False
        try:
            return self._store.packed.has_room(_HEADER + num_bytes)
        except OSError as error:
            log.warning("can't keep %s packed: %s", digest[:12], error)
            return False

    def _wanted_pieces(self, digest: str, weights: LoraWeights) -> Pieces | None:
        return self._pieces(digest, weights) if self._is_wanted(digest, weights) else None

    def _pieces(self, digest: str, weights: LoraWeights) -> Pieces:
        content, needs = self._layout.pack(weights), self._layout.needs_of(weights)
        ranks = {module.module: module.rank for group in needs.values() for module in group.modules}
        facts = {"layout": self._layout_digest, "digest": digest, "ranks": ranks}
        header = facts | {_SUM: _sum_of(facts, content)}
        text = json.dumps(header, separators=(",", ":")).encode().ljust(_HEADER)
        return [memoryview(text), memoryview(content.numpy().data)]

    def _keep(self, digest: str, weights: LoraWeights) -> None:
        try:
            self._store.packed.keep(digest, self._pieces(digest, weights))
        except (OSError, ValueError, RuntimeError) as error:
            log.warning("can't keep %s packed: %s", digest[:12], error)
        finally:
            self._writing.release()


def _fill(buffer: memoryview, file: FileIO) -> None:
    while buffer:
        num_read = file.readinto(buffer)
        if not num_read:
            raise OSError("the file has become shorter")
        buffer = buffer[num_read:]


def is_damaged(file: torch.Tensor) -> bool:
    """Return whether a packed file doesn't match the checksum in its header.

    `file` is the file's whole content. A file without a readable checksum counts as undamaged: no server uses it.
    """
    try:
        header = json.loads(file[:_HEADER].numpy().tobytes())
        expected = header.pop(_SUM)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # no server uses it
    return bool(expected != _sum_of(header, file[_HEADER:]))


def _sum_of(facts: Mapping[str, object], content: torch.Tensor) -> str:
    """Return the SHA-256 (hex) of a header's fields, except the checksum, and of the content."""
    sha = hashlib.sha256(json.dumps(facts).encode())
    sha.update(content.numpy().data)
    return sha.hexdigest()


def _digest_of(layout: RowLayout) -> str:
    """Return a digest of everything that determines the layout and dtypes of an adapter's numbers."""
    row_format, shape = layout.format, layout.shape
    facts = (
        *(FORMAT, str(row_format.a), str(row_format.b), row_format.tile, shape.num_layers),
        *(sorted(shape.features.items()), list(GROUPS.items())),
    )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
