"""Finds a base model by its name, directory or hub id, and converts it the first time.

Converted bases lie in `HOME/models`, one directory each. A directory for an image that carries its base
(`SMOLORA_BASE_DIR`) is looked in first and never written to. Any number of processes may resolve at once.
"""

import errno
import fcntl
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.durable import remove_unfinished
from server.errors import StartupError
from server.home import Home
from server.model.base.checkpoint import Checkpoint, open_directory
from server.model.base.convert import convert
from server.model.base.embedded import EMBEDDED, find_gguf, open_gguf
from server.model.base.hub import Snapshot, download
from server.model.base.weights import MANIFEST, read_manifest

Progress = Callable[[str], None]
"""Told, in a short line, before each thing that takes seconds or more."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class _Opened:
    checkpoint: Checkpoint
    origin: str
    revision: str | None = None


@dataclass(frozen=True)
class _Source:
    key: str  # of its directory under HOME/models; another one where the files are others
    name: str  # the base's id
    open: Callable[[Progress], _Opened]


def resolve_base(
    model: str,
    home: Path,
    base_dir: Path | None = None,
    progress: Progress = lambda line: None,
    fetch: Callable[[str], Snapshot] = download,
) -> Path:
    """The converted directory of `model`: the embedded default's name, a directory or a hub id, in this order.

    `load_base` takes it. A hub id that was converted once is never looked up again. Raises StartupError.
    """
    if model != EMBEDDED and read_manifest(Path(model)) is not None:
        return Path(model)  # converted already, by whoever made it
    try:
        source = _source(model, fetch)
    except OSError as error:
        raise StartupError(f"SMOLORA_MODEL={model} can't be read: {error.strerror or error}") from error
    models = Home(home).models
    places = [models / source.key] if base_dir is None else [base_dir / source.key, base_dir, models / source.key]
    if (found := _find(places, source.key)) is not None:
        return found
    try:
        with _lock(models, source.key):
            if (found := _find(places, source.key)) is not None:
                return found  # another process was quicker
            _convert(source, models, progress)
    except OSError as error:
        hint = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise StartupError(f"SMOLORA_HOME={home}: the base model can't be written there: {hint}") from error
    return models / source.key


def _source(model: str, fetch: Callable[[str], Snapshot]) -> _Source:
    directory = Path(model)
    if model == EMBEDDED:
        return _Source(EMBEDDED, EMBEDDED, _open_embedded)
    if directory.is_dir():
        directory = directory.resolve()
        key = f"{directory.name}-{_fingerprint(directory)}"
        return _Source(key, directory.name, lambda progress: _Opened(open_directory(directory), str(directory)))
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise StartupError(f"SMOLORA_MODEL={model}: not {EMBEDDED}, not a directory, not a hub id (owner/name)")
    owner, name = model.split("/")

    def open_hub(progress: Progress) -> _Opened:
        progress(f"Fetching {model} from the hub")
        snapshot = fetch(model)
        return _Opened(open_directory(snapshot.directory), model, snapshot.commit)

    return _Source(f"{owner}--{name}", name, open_hub)


def _open_embedded(progress: Progress) -> _Opened:
    gguf = find_gguf()
    progress(f"Dequantizing {gguf.name} (once, about half a minute)")
    return _Opened(open_gguf(gguf), gguf.name)


def _convert(source: _Source, models: Path, progress: Progress) -> None:
    """Open and write; then drop what the same origin was converted to before its files changed."""
    remove_unfinished(models, source.key)
    _remove(models / source.key)  # of an older format, if anything
    opened = source.open(progress)
    progress(f"Converting {source.name}")
    convert(opened.checkpoint, models / source.key, source.name, opened.origin, opened.revision)
    for other in models.iterdir():
        if other.name != source.key and (manifest := read_manifest(other)) and manifest.origin == opened.origin:
            _remove(other)


def _remove(directory: Path) -> None:
    """The manifest goes first: what a kill leaves is not taken for a base."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _find(places: list[Path], key: str) -> Path | None:
    for place in places:
        manifest = read_manifest(place)
        if manifest is not None and manifest.key == key:
            return place
    return None


def _fingerprint(directory: Path) -> str:
    """Changes with the files a base is read from: their names, sizes and times, not their bytes."""
    sha = hashlib.sha256(str(directory).encode())
    for file in sorted(directory.iterdir()):
        if file.suffix in (".json", ".safetensors", ".jinja"):
            stat = file.stat()
            sha.update(f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return sha.hexdigest()[:12]


@contextmanager
def _lock(models: Path, key: str) -> Iterator[None]:
    """Hold the right to write `key`; a process that dies lets go of it."""
    models.mkdir(parents=True, exist_ok=True)
    with (models / f".{key}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
