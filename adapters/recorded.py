"""The LoRA configuration of an adapter's version, as recorded for that version.

Versions with equal weights share stored files, and the adapter_config.json is that of the first version. But
equal weights don't imply equal configurations: ranks and alphas may be in patterns, and the base model's name may
differ. So the stored file is used only if it agrees with the version's record. Otherwise a new one is made.
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
"""The key, in a version's recorded configuration, of the digest of the uploaded adapter_config.json.

Only this module uses it.
"""


def of_upload(config: LoraConfig, file: bytes) -> dict[str, object]:
    """Return what a version records about its uploaded adapter_config.json: the file's settings and digest."""
    return {"lora": config.to_document(), FILE_DIGEST: f"sha256:{hashlib.sha256(file).hexdigest()}"}


def config_of(version: NewVersion, stored: PeftAdapter, num_layers: int) -> LoraConfig:
    """Return the version's configuration.

    `stored` is the stored adapter, which has the version's weights. `num_layers` is the base model's.
    """
    use_rslora = _uses_rslora(version, stored.config.use_rslora, stored.weights)
    return shaped(stored, version.rank, version.alpha, use_rslora, num_layers)


def shaped(stored: PeftAdapter, rank: int, alpha: float, use_rslora: bool, num_layers: int) -> LoraConfig:
    """Return the stored configuration if it has these settings, otherwise an equivalent one that has them."""
    if _is_of(stored.config, rank, alpha, use_rslora):
        return stored.config
    return describe(stored.weights, rank, alpha, use_rslora, num_layers)


def own_files(version: NewVersion, store: AdapterStore) -> dict[str, BinaryIO]:
    """Open PEFT's two files of the version: the stored tensors, and the version's own configuration.

    The tensors are read and checked first, since the client couldn't notice damage. Raise OSError if they can't be
    read, or CorruptAdapter if they are damaged or missing.
    """
    for file in store.open(version.digest).values():
        with file:  # a disk that can't be read raises OSError here; in mapped memory it would kill the process
            while file.read(1 << 20):
                pass
    weights = store.load(version.digest)
    if weights.digest != version.digest:
        store.verify(version.digest)  # raises, or downloads a damaged local copy again
        weights = store.load(version.digest)
    stored = store.open(version.digest)
    with stored[CONFIG_NAME] as file:
        content = file.read()
    config = peft_config.parse(content, [])
    use_rslora = _uses_rslora(version, config is not None and config.use_rslora, weights)
    if config is None or not _is_own(version, content, config, use_rslora):
        # the version may be for another base than the served one, so the number of layers is unknown
        own = describe(weights, version.rank, version.alpha, use_rslora, num_layers=None)
        content = config_json(own, version.base_model)
    return {**stored, CONFIG_NAME: BytesIO(content)}


def _is_own(version: NewVersion, content: bytes, config: PeftConfig, use_rslora: bool) -> bool:
    """Return whether the stored adapter_config.json was uploaded with the version.

    If no upload is recorded for the version, return whether the file has the version's settings.
    """
    if (digest := version.config.get(FILE_DIGEST)) is not None:
        return digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    is_same_base = config.base_model == version.base_model
    return is_same_base and _is_of(config, version.rank, version.alpha, use_rslora)


def _is_of(config: LoraConfig | PeftConfig, rank: int, alpha: float, use_rslora: bool) -> bool:
    return (config.rank, config.alpha, config.use_rslora) == (rank, alpha, use_rslora)


def _uses_rslora(version: NewVersion, stored: bool, weights: LoraWeights) -> bool:
    """Return whether the version uses rank-stabilized LoRA.

    Merges have no record of this, and the records of other projects' versions are hidden. For these, return
    `stored`, the stored file's answer, unless only the opposite answer fits the version's alpha and the scalings
    of `weights`.
    """
    lora = version.config.get("lora")
    recorded = lora.get("use_rslora") if isinstance(lora, Mapping) else None
    if isinstance(recorded, bool):
        return recorded
    is_other = explains(version.alpha, not stored, weights) and not explains(version.alpha, stored, weights)
    return stored != is_other
