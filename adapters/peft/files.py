"""Read, check and write PEFT's two files, adapter_config.json and adapter_model.safetensors.

Plain LoRA on the layers' linear modules, saved by PEFT for a base model of the same shape, is read exactly.
Anything else is refused, with an error for each key at fault. PEFT can load the written files.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import torch

from adapters.errors import FieldError, InvalidAdapter
from adapters.lora import MODULES, BaseShape, LoraConfig, LoraModule, LoraWeights, ModuleKey, scaling
from adapters.peft import config as peft_config
from adapters.peft import tensor_file
from adapters.peft.config import PeftConfig
from adapters.peft.targets import BadTargetsError, Budget, pick, resolve
from adapters.peft.tensor_file import (
    SIDES,
    FoundTensors,
    TensorEntry,
    TensorFileError,
    collect,
    guess,
    tensor_error,
    tensor_name,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_CONFIG_ERRORS = 32
MAX_TENSOR_ERRORS = 10
"""The number of tensors that one error names. If more are wrong, `guess` describes their common cause."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """An adapter with its configuration. `base_model` is the base model's name that it gives, or None."""

    config: LoraConfig
    weights: LoraWeights
    base_model: str | None = None


def read(config_json: bytes, tensors: bytes | Path, base: BaseShape) -> PeftAdapter:
    """Read an adapter that PEFT saved. Tensors from a path are mapped from the file, not copied.

    Raise InvalidAdapter with one error for each key at fault: ("adapter_config", key) or ("adapter_model", name).
    """
    errors: list[FieldError] = []
    config = peft_config.parse(config_json, errors)
    found = FoundTensors()
    entries: Mapping[str, TensorEntry] | None = None
    try:
        buffer = tensor_file.map_file(tensors) if isinstance(tensors, Path) else tensor_file.copy_bytes(tensors)
        entries = tensor_file.read_header(buffer)
        found = collect(entries, buffer, base, errors)
    except TensorFileError as error:
        errors.append(FieldError(("adapter_model",), str(error)))
        config = None  # there are no tensors to compare it with
    adapter: PeftAdapter | None = None
    ranks: dict[ModuleKey, int] | None = None
    if config is None:
        _check_pairs({key for key, _ in found.names}, found, errors)
    else:
        try:
            budget = Budget()
            ranks = _ranks(config, base, budget)
            adapter = _assemble(config, ranks, found, base, budget, errors)
        except BadTargetsError as error:
            errors.append(FieldError(("adapter_config", error.field), str(error)))
    if adapter is None or errors:
        raise _invalid_adapter(errors, None if entries is None else guess(entries, base, ranks))
    return adapter


def read_ranks(config_json: bytes, base: BaseShape) -> dict[ModuleKey, int]:
    """Return the rank of each module that a configuration targets. Raise InvalidAdapter if a key is at fault."""
    errors: list[FieldError] = []
    if (config := peft_config.parse(config_json, errors)) is not None:
        try:
            return _ranks(config, base, Budget())
        except BadTargetsError as error:
            errors.append(FieldError(("adapter_config", error.field), str(error)))
    raise InvalidAdapter(errors)


def write(directory: Path, adapter: PeftAdapter) -> None:
    """Write PEFT's two files and sync them to disk. Raise ValueError if the config contradicts the weights."""
    config, modules = adapter.config, adapter.weights.modules
    for key, module in modules.items():
        described = (config.rank_of(key), config.scaling_of(key))
        if not config.targets(key) or described != (module.rank, module.scaling):
            raise ValueError(f"the config contradicts the weights of {key.path}")
    write_synced(directory / CONFIG_NAME, config_json(config, adapter.base_model))
    tensors: dict[str, torch.Tensor] = {}
    for key in sorted(modules, key=in_forward_order):
        tensors[tensor_name(key, "A")] = modules[key].a
        tensors[tensor_name(key, "B")] = modules[key].b
    with open(directory / WEIGHTS_NAME, "wb") as file:
        tensor_file.write(file, tensors)
        _sync(file)


def with_base(config_json: bytes, base_model: str, revision: str | None) -> bytes:
    """Return a valid adapter_config.json with another name of its base, and the revision of that base."""
    document = json.loads(config_json)
    return json.dumps(document | {"base_model_name_or_path": base_model, "revision": revision}, indent=2).encode()


def config_json(config: LoraConfig, base_model: str | None) -> bytes:
    """Return an adapter_config.json for PEFT."""
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _shortest(config.alpha),
        "lora_dropout": 0.0,
        "target_modules": list(config.target_modules),
        "layers_to_transform": None if config.layers_to_transform is None else list(config.layers_to_transform),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _shortest(alpha) for key, alpha in config.alpha_pattern.items()},
        "use_rslora": config.use_rslora,
        "bias": "none",
        "init_lora_weights": True,
    }
    return json.dumps(document, indent=2).encode()


def describe(
    weights: LoraWeights, rank: int, alpha: float, use_rslora: bool, num_layers: int | None
) -> LoraConfig:
    """Return a configuration for the weights. Its patterns list the modules with another rank or alpha.

    `num_layers` is the base model's, or None if it is unknown.
    """
    modules = weights.modules
    names, layers = targets_of(sorted(modules, key=in_forward_order), num_layers)
    ranks = exceptions_of({key: module.rank for key, module in modules.items()}, rank)
    alphas = exceptions_of({key: _alpha(module, alpha, use_rslora) for key, module in modules.items()}, alpha)
    return LoraConfig(rank, alpha, names, use_rslora, ranks, alphas, layers)


def explains(alpha: float, use_rslora: bool, weights: LoraWeights) -> bool:
    """Return whether any module has the scaling that follows from `alpha`, `use_rslora` and the module's rank."""
    modules = weights.modules.values()
    return any(scaling(alpha, module.rank, use_rslora) == module.scaling for module in modules)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        _sync(file)


def _ranks(config: PeftConfig, base: BaseShape, budget: Budget) -> dict[ModuleKey, int]:
    """Return the rank of each targeted module, in the order of the forward pass.

    Raise BadTargetsError if the targets or `rank_pattern` can't be resolved.
    """
    keys = sorted(resolve(config.targeting, base, budget), key=in_forward_order)
    given = pick("rank_pattern", config.rank_pattern, keys, budget)
    return {key: given.get(key, config.rank) for key in keys}


def _assemble(
    config: PeftConfig,
    ranks: Mapping[ModuleKey, int],
    found: FoundTensors,
    base: BaseShape,
    budget: Budget,
    errors: list[FieldError],
) -> PeftAdapter | None:
    """Return the adapter. If config and tensors disagree, append to `errors` and return None.

    Raise BadTargetsError if `alpha_pattern` can't be resolved.
    """
    keys = list(ranks)
    given_alphas = pick("alpha_pattern", config.alpha_pattern, keys, budget)
    alphas = {key: given_alphas.get(key, config.alpha) for key in keys}
    _check_pairs(keys, found, errors)
    for (key, side), name in found.names.items():
        if key not in ranks:
            errors.append(tensor_error(name, "is for a module that the configuration doesn't target"))
        elif (tensor := found.tensors.get((key, side))) is not None:
            rank = tensor.shape[SIDES.index(side)]
            if rank != ranks[key]:
                errors.append(tensor_error(name, f"has rank {rank}, but the configuration says {ranks[key]}"))
    if errors:
        return None
    names, layers = targets_of(keys, base.num_layers)
    lora_config = LoraConfig(
        rank=config.rank,
        alpha=config.alpha,
        target_modules=names,
        use_rslora=config.use_rslora,
        rank_pattern=exceptions_of(ranks, config.rank),
        alpha_pattern=exceptions_of(alphas, config.alpha),
        layers_to_transform=layers,
    )
    modules = {
        key: LoraModule(found.tensors[key, "A"], found.tensors[key, "B"], lora_config.scaling_of(key))
        for key in keys
    }
    return PeftAdapter(lora_config, LoraWeights(modules), config.base_model)


def _check_pairs(keys: Iterable[ModuleKey], found: FoundTensors, errors: list[FieldError]) -> None:
    """Append an error for each missing A or B: PEFT would silently leave it as it was initialized."""
    for key in keys:
        errors.extend(
            tensor_error(tensor_name(key, side), "is missing") for side in SIDES if (key, side) not in found.names
        )


def targets_of(
    keys: Iterable[ModuleKey], num_layers: int | None
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Return the `target_modules` and `layers_to_transform` that select exactly the modules `keys`.

    If `num_layers` is None (unknown), the layers are listed even if they are all layers of the base model.
    """
    layers: dict[str, set[int]] = {}
    for key in keys:
        layers.setdefault(key.module, set()).add(key.layer)
    names = tuple(name for name in MODULES if name in layers)
    first = layers[names[0]]
    if all(layers[name] == first for name in names):
        return names, None if len(first) == num_layers else tuple(sorted(first))
    return tuple(key.path for key in keys), None


def exceptions_of(values: Mapping[ModuleKey, _Value], default: _Value) -> dict[str, _Value]:
    """Return the values that differ from `default`, in the form of PEFT's `rank_pattern` and `alpha_pattern`.

    A key is the module's name if all layers have the same value, else the module's path.
    """
    by_name: dict[str, set[_Value]] = {}
    for key, value in values.items():
        by_name.setdefault(key.module, set()).add(value)
    pattern: dict[str, _Value] = {}
    for key, value in values.items():
        if value != default:
            pattern[key.module if len(by_name[key.module]) == 1 else key.path] = value
    return pattern


def in_forward_order(key: ModuleKey) -> tuple[int, int]:
    """Return the sort key for modules in the order of the forward pass."""
    return key.layer, MODULES.index(key.module)


def _shortest(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _invalid_adapter(errors: Sequence[FieldError], guessed: str | None) -> InvalidAdapter:
    """Return an error with the first errors of each file.

    If the tensors have more errors than can be named, `guessed`, the guess at their cause, precedes them.
    """
    of_config = [error for error in errors if error.loc[0] == "adapter_config"]
    of_tensors = [error for error in errors if error.loc[0] != "adapter_config"]
    shown = of_config[:MAX_CONFIG_ERRORS]
    if guessed is not None and len(of_tensors) > MAX_TENSOR_ERRORS:
        shown.append(FieldError(("adapter_model",), guessed))
    shown += of_tensors[:MAX_TENSOR_ERRORS]
    num_named = len(of_config[:MAX_CONFIG_ERRORS]) + len(of_tensors[:MAX_TENSOR_ERRORS])
    return InvalidAdapter(shown, len(errors) - num_named)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _alpha(module: LoraModule, usual: float, use_rslora: bool) -> float:
    """Return an alpha that gives exactly the module's scaling: `usual` if possible, else a short decimal."""
    # the scaling is a quotient, so dividing the rounded product gives the same quotient again
    exact = module.scaling * (float(module.rank) ** 0.5 if use_rslora else float(module.rank))
    likely = (usual, float(f"{exact:.15g}"))
    fits = (alpha for alpha in likely if scaling(alpha, module.rank, use_rslora) == module.scaling)
    return next(fits, exact)
