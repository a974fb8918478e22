"""Adapters read as they are to lie in the pools, from packed files beside stored ones (`adapters.store.packed`).

A file is one page that says what it holds, and then `PackedRows.content`. To load the adapter is to check the
page, and to place it is to read each group's runs. The file is written when an adapter is put into the store, or
in the background after an adapter without one was loaded. A file that isn't what is expected (another layout or
length) is dropped, and made again. Only reading all of it shows whether a disk has changed it: `smolora doctor`
does (`is_damaged`), a load doesn't.
Which adapters have none, `_is_wanted` says: they are placed as they were published, in the same bits.
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
"""Grows with any change of what `RowLayout.pack` makes of the same weights."""
_HEADER = 4096  # bytes, so that what follows begins with a page
_SUM = "sum"  # the header's key for `_sum_of` all else
_MAX_GROWTH = 4
"""Times an adapter's published bytes that its packed form may take. Rows lie in every layer, as many as the
largest rank of any asks for: of an adapter of one layer nearly all would be zeros, which no file brings sooner. So
no upload fills a server's memory and disk, of which quotas don't count this, with much more than itself."""
_SMALL = 1 << 20
"""Bytes of a packed form that is kept however few of the layers it is of."""

log = logging.getLogger(__name__)


class PackedAdapters:
    """Those of one store, for one layout. Thread-safe."""

    def __init__(
        self, store: AdapterStore, layout: RowLayout, min_free_bytes: int = 0, max_bytes: int | None = None
    ) -> None:
        """From now on the store keeps a packed file of what is put, as far as that is wanted.

        `min_free_bytes` are what others need of the disk; `max_bytes` what the pools have room for, if known.
        """
        self._store = store
        self._layout = layout
        self._max_bytes = max_bytes
        self._layout_digest = _digest_of(layout)
        self._writing = threading.Lock()
        store.packed.min_free_bytes = min_free_bytes
        store.packed.make = self._wanted_pieces

    def load(self, digest: str) -> Stored:
        """Return the adapter, still in its packed file or, if it has none, as it was published.

        Neither takes memory of its own, however long it waits to be placed. Raises CorruptAdapter.
        """
        try:
            with self._store.packed.open(digest) as file:
                return self._check(digest, file)
        except OSError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            self._store.packed.remove(digest)
        weights = self._store.load(digest)
        # where another is being written, the next load may do it
        if self._is_wanted(digest, weights) and self._writing.acquire(blocking=False):
            what = (digest, weights)
            try:
                threading.Thread(target=self._keep, args=what, name="adapter-packer", daemon=True).start()
            except RuntimeError:  # no thread to be had
                self._writing.release()
        return weights

    def _check(self, digest: str, file: FileIO) -> PackedFile:
        page = file.read(_HEADER)
        header = json.loads(page)
        if (header["layout"], header["digest"]) != (self._layout_digest, digest):
            raise ValueError("of another layout or adapter")
        if _SUM not in header:
            raise ValueError("of an older release, which nobody could check")
        needs = self._layout.needs(header["ranks"])
        if os.fstat(file.fileno()).st_size != _HEADER + self._layout.num_bytes(needs):
            raise ValueError("of another length")
        return PackedFile(needs, partial(self._read, digest, page))

    def _read(self, digest: str, page: bytes, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers with what follows the header `page`. If that fails, the file is dropped."""
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
        """Whether to keep the adapter packed: asked before any memory is taken for that."""
        num_bytes = self._layout.num_bytes(self._layout.needs_of(weights))
        published = sum(module.a.nbytes + module.b.nbytes for module in weights.modules.values())
        if num_bytes > max(_MAX_GROWTH * published, _SMALL):
            return False
        if self._max_bytes is not None and num_bytes > self._max_bytes:  # which is never placed
            return False
        try:
            return self._store.packed.has_room(_HEADER + num_bytes)
        except OSError as error:
            log.warning("can't keep %s packed: %s", digest[:12], error)
            return False

    def _wanted_pieces(self, digest: str, weights: LoraWeights) -> Pieces | None:
        return self._pieces(digest, weights) if self._is_wanted(digest, weights) else None

    def _pieces(self, digest: str, weights: LoraWeights) -> Pieces:
        rows = self._layout.pack(weights)
        ranks = {module.module: module.rank for group in rows.needs.values() for module in group.modules}
        facts = {"layout": self._layout_digest, "digest": digest, "ranks": ranks}
        header = facts | {_SUM: _sum_of(facts, rows.content)}
        text = json.dumps(header, separators=(",", ":")).encode().ljust(_HEADER)
        return [memoryview(text), memoryview(rows.content.numpy().data)]

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
    """Whether a packed file, given whole, was changed since it was written, and would be read all the same."""
    try:
        header = json.loads(file[:_HEADER].numpy().tobytes())
        told = header.pop(_SUM)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # which no server reads
    return bool(told != _sum_of(header, file[_HEADER:]))


def _sum_of(facts: Mapping[str, object], content: torch.Tensor) -> str:
    """SHA-256 (hex) of what a file tells of its content, and of that."""
    sha = hashlib.sha256(json.dumps(facts).encode())
    sha.update(content.numpy().data)
    return sha.hexdigest()


def _digest_of(layout: RowLayout) -> str:
    """Of everything that decides where an adapter's numbers lie, and as what."""
    row_format, shape = layout.format, layout.shape
    facts = (
        *(FORMAT, str(row_format.a), str(row_format.b), row_format.tile, shape.num_layers),
        *(sorted(shape.features.items()), list(GROUPS.items())),
    )
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
