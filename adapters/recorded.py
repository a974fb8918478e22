"""A version's configuration, as the version itself has it.

Bytes belong to all who published the same, and the adapter_config.json beside them is the first one's. Equal
weights don't make equal files: rank and alpha may stand in patterns, and a base's name is anybody's. So the stored
file is a version's only where it says what the version's own record does.
"""

import hashlib
from collections.abc import Mapping
from io import BytesIO
from typing import BinaryIO

from adapters.catalog.versions import NewVersion
from adapters.lora import LoraConfig, LoraWeights
from adapters.peft import config as peft_config
from adapters.peft.config import PeftConfig
from adapters.peft.files import CONFIG_NAME, PeftAdapter, config_json, describe, explains
from adapters.store.store import AdapterStore

FILE_DIGEST = "adapter_config"
"""Under which an upload's version keeps its file's digest, for this module alone."""


def of_upload(config: LoraConfig, file: bytes) -> dict[str, object]:
    """What the version of an uploaded adapter_config.json keeps of it."""
    return {"lora": config.to_document(), FILE_DIGEST: f"sha256:{hashlib.sha256(file).hexdigest()}"}


def config_of(version: NewVersion, stored: PeftAdapter, num_layers: int) -> LoraConfig:
    """The version's, whose bytes are `stored`; `num_layers` is the base's."""
    use_rslora = _uses_rslora(version, stored.config.use_rslora, stored.weights)
    return shaped(stored, version.rank, version.alpha, use_rslora, num_layers)


def shaped(stored: PeftAdapter, rank: int, alpha: float, use_rslora: bool, num_layers: int) -> LoraConfig:
    """The stored one if it is of this rank and alpha, as weights then decide the rest; else one that is."""
    if _is_of(stored.config, rank, alpha, use_rslora):
        return stored.config
    return describe(stored.weights, rank, alpha, use_rslora, num_layers)


def own_files(version: NewVersion, store: AdapterStore) -> dict[str, BinaryIO]:
    """PEFT's two files as they are stored, but with a configuration that is the version's; the tensors are read
    whole, since whoever gets changed ones can't know it. Raises OSError, or CorruptAdapter.
    """
    for file in store.open(version.digest).values():
        with file:  # a disk that can't be read is an error here, and the end of the process in a map
            while file.read(1 << 20):
                pass
    weights = store.load(version.digest)
    if weights.digest != version.digest:
        store.verify(version.digest)  # raises, but for a machine's copy, which is fetched anew
        weights = store.load(version.digest)
    stored = store.open(version.digest)
    with stored[CONFIG_NAME] as file:
        content = file.read()
    config = peft_config.parse(content, [])
    use_rslora = _uses_rslora(version, config is not None and config.use_rslora, weights)
    if config is None or not _is_own(version, content, config, use_rslora):
        # the base may be another than the one that is served
        own = describe(weights, version.rank, version.alpha, use_rslora, num_layers=None)
        content = config_json(own, version.base_model)
    return {**stored, CONFIG_NAME: BytesIO(content)}


def _is_own(version: NewVersion, content: bytes, config: PeftConfig, use_rslora: bool) -> bool:
    """Whether the stored file is the one that was uploaded; of what wasn't, whether it says the same."""
    if (digest := version.config.get(FILE_DIGEST)) is not None:
        return digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    is_same_base = config.base_model == version.base_model
    return is_same_base and _is_of(config, version.rank, version.alpha, use_rslora)


def _is_of(config: LoraConfig | PeftConfig, rank: int, alpha: float, use_rslora: bool) -> bool:
    return (config.rank, config.alpha, config.use_rslora) == (rank, alpha, use_rslora)


def _uses_rslora(version: NewVersion, stored: bool, weights: LoraWeights) -> bool:
    """As recorded. Merges and old records don't say, another project's isn't shown: then as the file says, unless
    it is the other way that the version's alpha makes sense.
    """
    lora = version.config.get("lora")
    recorded = lora.get("use_rslora") if isinstance(lora, Mapping) else None
    if isinstance(recorded, bool):
        return recorded
    is_other = explains(version.alpha, not stored, weights) and not explains(version.alpha, stored, weights)
    return stored != is_other
