"""Read adapter_config.json, as PEFT up to 0.21 writes it, and check each key.

Keys for plain LoRA on linear modules are read. Keys without an effect on a loaded adapter are ignored. Any other
key is refused unless its value is null, false or empty.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from adapters.errors import FieldError
from adapters.peft.targets import Targeting
from adapters.strict_json import BadJsonError, parse_object, printable

MAX_BYTES = 1 << 20
MAX_BASE_NAME = 1000

INERT = frozenset(
    {
        # metadata of the file and the training
        *("auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config"),
        # settings of features that `init_lora_weights` or another key would have to enable
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
        # for targeted embeddings, which are refused
        "ensure_weight_tying",
    }
)
"""Keys without an effect on what a loaded adapter computes, whatever their value."""

WHY_NOT = {
    "use_dora": "DoRA rescales the frozen weights, which plain LoRA can't do; train with use_dora=False",
    "lora_bias": "a bias on B isn't supported; train with lora_bias=False",
    "modules_to_save": "whole modules trained beside LoRA aren't supported; train without modules_to_save",
    "trainable_token_indices": "trained embeddings aren't supported; train without trainable_token_indices",
    "layer_replication": "the base's layers can't be repeated for one adapter",
    "fan_in_fan_out": "the base's modules store (out, in) weights; train with fan_in_fan_out=False",
    "target_parameters": "only linear modules can be targeted, not bare parameters",
}
"""Error messages for keys that people do set."""

CHANGES_W = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that subtract the initial update from the frozen W, so that the adapter needs a changed base."""

_NO_BIASES = (
    'must be "none": trained biases aren\'t supported. The base has none to train: if the file of tensors has '
    'none either, set it to "none"'
)
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
_MAX_NUMBER = 1 << 31
_NUMBERS: Mapping[type, str] = {int: "a whole number above 0", float: "a number above 0"}
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class PeftConfig:
    """The contents of adapter_config.json. Its targets are not yet resolved to modules of a base model."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targeting: Targeting
    base_model: str | None


def parse(data: bytes, errors: list[FieldError]) -> PeftConfig | None:
    """Return the configuration, or None after appending an error for each key at fault to `errors`."""
    before = len(errors)
    try:
        if len(data) > MAX_BYTES:
            raise BadJsonError(f"is {len(data)} bytes long, the most is {MAX_BYTES}")
        members = parse_object(data)
    except BadJsonError as error:
        errors.append(FieldError(("adapter_config",), str(error)))
        return None
    reader = _Reader(members, errors)
    config = reader.config()
    reader.refuse_the_rest()
    return config if len(errors) == before else None


class _Reader:
    """Reads the keys in `members`, and appends an error for each key at fault to `errors`."""

    def __init__(self, members: Mapping[str, object], errors: list[FieldError]) -> None:
        self.members = members
        self.errors = errors
        self.known = set(INERT)

    def config(self) -> PeftConfig:
        self.check("peft_type", lambda value: value == "LORA", 'must be "LORA": no other method is supported')
        self.check("task_type", _is_task, 'must be "CAUSAL_LM" or null: other tasks have a head that isn\'t LoRA')
        self.check("bias", lambda value: value == "none", _NO_BIASES, "none")
        self.check("lora_dropout", _is_share, "must be a number from 0 to 1", 0.0)
        self.check_init()
        config = PeftConfig(
            rank=self.number("r", int),
            alpha=self.number("lora_alpha", float),
            use_rslora=self.flag("use_rslora"),
            rank_pattern=self.pattern("rank_pattern", int),
            alpha_pattern=self.pattern("alpha_pattern", float),
            targeting=Targeting(
                target_modules=self.names("target_modules"),
                exclude_modules=self.names("exclude_modules", required=False),
                layers_to_transform=self.layers(),
                layers_pattern=self.layers_pattern(),
            ),
            base_model=self.base_model(),
        )
        if isinstance(config.targeting.target_modules, str):
            for key in ("layers_to_transform", "layers_pattern"):
                if self.members.get(key) is not None:
                    self.refuse(key, "doesn't go with target_modules as a string; PEFT refuses it too")
        elif config.targeting.layers_pattern and config.targeting.layers_to_transform is None:
            self.refuse("layers_pattern", "needs layers_to_transform; PEFT refuses it too")
        return config

    def refuse(self, key: str, message: str) -> None:
        self.errors.append(FieldError(("adapter_config", printable(key)), message))

    def get(self, key: str, default: object = None) -> object:
        self.known.add(key)
        return self.members.get(key, default)

    def refuse_the_rest(self) -> None:
        for key, value in self.members.items():
            if key not in self.known and not _is_nothing(value):
                reason = "isn't known to plain LoRA, so it can't be honoured: it must be null, false or empty"
                self.refuse(key, WHY_NOT.get(key, reason))

    def check(self, key: str, good: Callable[[object], bool], message: str, default: object = None) -> None:
        if not good(self.get(key, default)):
            self.refuse(key, message)

    def check_init(self) -> None:
        value = self.get("init_lora_weights", True)
        if value is None or isinstance(value, bool):
            return
        name = value.lower() if isinstance(value, str) else ""
        if name.startswith(CHANGES_W):
            message = "was subtracted from the base's weights; convert it to plain LoRA when saving, with PEFT's "
            self.refuse("init_lora_weights", f"{name[:20]} {message}path_initial_model_for_weight_conversion")
        elif value not in _HARMLESS_INITS and name not in (
            "gaussian",
            "mica",
        ):  # in upper or lower case
            self.refuse("init_lora_weights", f"must be true, false or one of {', '.join(_HARMLESS_INITS)}")

    def number(self, key: str, kind: type[Number]) -> Number:
        value = self.get(key)
        if (number := _positive(value, kind)) is None:
            self.refuse(key, f"must be {_NUMBERS[kind]}")
            return kind(1)
        return number

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value is True

    def pattern(self, key: str, kind: type[Number]) -> dict[str, Number]:
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, f"must be an object of {_NUMBERS[kind]} for each pattern")
        numbers: dict[str, Number] = {}
        for entry, entry_value in (value if isinstance(value, dict) else {}).items():
            if (number := _positive(entry_value, kind)) is None:
                self.refuse(key, f"'{printable(entry)}' must be {_NUMBERS[kind]}")
            else:
                numbers[entry] = number
        return numbers

    def names(self, key: str, required: bool = True) -> str | tuple[str, ...]:
        value = self.get(key)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
            return tuple(value)
        if required or not _is_nothing(value):
            self.refuse(key, "must be a list of modules' names or a regular expression")
        return ()

    def layers(self) -> tuple[int, ...] | None:
        value = self.get("layers_to_transform")
        if value is None:
            return None
        layers: list[object] = value if isinstance(value, list) else [value]
        numbers = tuple(layer for layer in layers if isinstance(layer, int) and not isinstance(layer, bool))
        if len(numbers) != len(layers):
            self.refuse("layers_to_transform", "must be a list of layers' numbers")
        return numbers

    def layers_pattern(self) -> tuple[str, ...]:
        value = self.get("layers_pattern")
        values = [value] if isinstance(value, str) and value else value
        if _is_nothing(values):
            return ()
        if not isinstance(values, list) or not all(isinstance(pattern, str) for pattern in values):
            self.refuse("layers_pattern", "must be a string or a list of strings")
            return ()
        return tuple(values)

    def base_model(self) -> str | None:
        value = self.get("base_model_name_or_path")
        if value is None:
            return None
        if not isinstance(value, str) or len(value) > MAX_BASE_NAME or not value.isprintable():
            self.refuse("base_model_name_or_path", f"must be null or at most {MAX_BASE_NAME} printable characters")
            return None
        return value or None


def _positive(value: object, kind: type[Number]) -> Number | None:
    """Return `value` as a positive `kind`, or None if it isn't one. Integers are valid floats; booleans aren't."""
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        return None
    if not 0 < value <= _MAX_NUMBER:
        return None
    return kind(value)


def _is_nothing(value: object) -> bool:
    return value is None or value is False or value == "" or value == [] or value == {}


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_task(value: object) -> bool:
    return value in _TASKS
