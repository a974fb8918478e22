"""smolora.json, which lies beside a stored adapter's files and makes loading quick.

It holds what would otherwise take PEFT's rules to work out, the modules and their effective scalings, and the
files' sizes, by which a directory that lost something is told from a whole one. Of the configuration, which is in
no adapter's digest, it holds the SHA-256.
"""

import hashlib
import json
import os
from pathlib import Path

from adapters.errors import CorruptAdapter
from adapters.lora import LoraModule, LoraWeights, ModuleKey
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from adapters.peft.tensor_file import map_file, read_header
from adapters.peft.tensors import tensor_name

SIDECAR_NAME = "smolora.json"
FORMAT = 1


def describe(weights: LoraWeights, directory: Path) -> bytes:
    """The sidecar of `weights`, whose two files are in `directory`."""
    sizes = {name: (directory / name).stat().st_size for name in (CONFIG_NAME, WEIGHTS_NAME)}
    modules = [[key.layer, key.module, module.scaling] for key, module in weights.modules.items()]
    document = {"format": FORMAT, "digest": weights.digest, "sizes": sizes, "modules": modules}
    document["config"] = hashlib.sha256((directory / CONFIG_NAME).read_bytes()).hexdigest()
    return json.dumps(document, separators=(",", ":")).encode()


def is_whole(directory: Path, damaged: os.stat_result | None = None) -> bool:
    """Whether all files are there, in their full sizes, and it isn't the `damaged` directory."""
    try:
        sizes = json.loads((directory / SIDECAR_NAME).read_bytes())["sizes"]
        has_all = all((directory / name).stat().st_size == sizes[name] for name in (CONFIG_NAME, WEIGHTS_NAME))
        return has_all and not (damaged is not None and os.path.samestat(directory.stat(), damaged))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damaged(directory: Path, digest: str) -> os.stat_result | None:
    """The directory, where it is there and isn't what was put: all of its bytes are read."""
    try:
        found = directory.stat()
        check(directory, digest, load(directory, digest))
        return None
    except CorruptAdapter:
        return found
    except OSError:
        return None


def load(directory: Path, digest: str) -> LoraWeights:
    """The weights, mapped from the file. Raises CorruptAdapter if anything is missing or doesn't fit."""
    try:
        document = json.loads((directory / SIDECAR_NAME).read_bytes())
        if document["format"] != FORMAT:
            raise ValueError("a format of another version of smolora")
        buffer = map_file(directory / WEIGHTS_NAME)
        entries = read_header(buffer)
        modules: dict[ModuleKey, LoraModule] = {}
        for layer, name, scaling in document["modules"]:
            key = ModuleKey(layer, name)
            a, b = entries[tensor_name(key, "A")].view(buffer), entries[tensor_name(key, "B")].view(buffer)
            modules[key] = LoraModule(a, b, scaling)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error
    return LoraWeights(modules)


def check(directory: Path, digest: str, weights: LoraWeights) -> None:
    """Raises CorruptAdapter unless what was loaded has the digest, and the configuration beside it is that which
    was written with it, as far as the sidecar knows: older releases' don't.
    """
    if weights.digest != digest:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} no longer matches its digest")
    try:
        told = json.loads((directory / SIDECAR_NAME).read_bytes()).get("config")
        found = hashlib.sha256((directory / CONFIG_NAME).read_bytes()).hexdigest()
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is missing or unreadable") from error
    if told not in (None, found):
        raise CorruptAdapter(f"the stored adapter {digest[:12]} is damaged: its {CONFIG_NAME} was changed")
