"""Which modules a PEFT configuration targets and which rank and alpha each gets: PEFT's own rules, exactly.

Follows `check_target_module_exists`, `_maybe_include_all_linear_layers` and `get_pattern_key` of PEFT 0.21,
applied to the names that the modules of Hugging Face's Llama and SmolLM3 have.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from adapters.lora import MODULES, BaseShape, ModuleKey
from adapters.peft.patterns import BadPatternError, Budget, Pattern, find

ALL_LINEAR = "all-linear"
_Value = TypeVar("_Value")

# From as many entries on, PEFT rewrites the list into shorter suffixes, to which layers_to_transform applies anew.
_PEFT_REWRITES_FROM = 20

_IN_EACH_LAYER = ("", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm")
_OUTSIDE_LAYERS = ("model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")


class BadTargetsError(ValueError):
    """A targeting that can't be honoured; `field` is the configuration's key at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Targeting:
    """The keys of adapter_config.json that choose modules. A string is a regular expression (or "all-linear")."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()


def linear_modules(base: BaseShape) -> dict[str, ModuleKey]:
    """All that an adapter may target, by path."""
    keys = (ModuleKey(layer, module) for layer in range(base.num_layers) for module in MODULES)
    return {key.path: key for key in keys}


def other_modules(base: BaseShape) -> tuple[str, ...]:
    """The paths of the base's other modules, where PEFT would put something else than plain LoRA, or refuse."""
    layers = (f"model.layers.{layer}{end}" for layer in range(base.num_layers) for end in _IN_EACH_LAYER)
    return (*_OUTSIDE_LAYERS, *layers)


def resolve(targeting: Targeting, base: BaseShape, budget: Budget) -> frozenset[ModuleKey]:
    """The targeted modules. Raises BadTargetsError if there are none, or any that isn't a layer's linear one."""
    linear = linear_modules(base)
    if isinstance(targeting.target_modules, str) and targeting.target_modules.lower() == ALL_LINEAR:
        # PEFT lists the linear modules' paths, the output embedding's excepted, and goes on with that list.
        hit = set(linear)
    else:
        hit = _targeted(targeting, [*linear, *other_modules(base)], budget)
    if targeting.exclude_modules:
        hit -= _listed("exclude_modules", targeting.exclude_modules, sorted(hit), budget)
    if strangers := sorted(hit - set(linear)):
        shown = ", ".join(strangers[:3]) + (", …" if len(strangers) > 3 else "")
        message = f"reaches {shown}: only the linear modules of the layers ({', '.join(MODULES)}) can be targeted"
        raise BadTargetsError("target_modules", message)
    if not hit:
        raise BadTargetsError("target_modules", "matches no linear module of this base")
    return frozenset(linear[path] for path in hit)


def pick(
    field: str, pattern: Mapping[str, _Value], keys: Sequence[ModuleKey], budget: Budget
) -> dict[ModuleKey, _Value]:
    """What `rank_pattern` or `alpha_pattern` gives each module: the first entry that matches wins."""
    entries = list(pattern)
    patterns = [Pattern(rf"(.*\.)?({text})$", "match", text) for text in entries]
    rows = _find(field, patterns, [key.path for key in keys], budget)
    picked: dict[ModuleKey, _Value] = {}
    for entry, row in zip(entries, rows, strict=True):
        for key, found in zip(keys, row, strict=True):
            if found is not None:
                picked.setdefault(key, pattern[entry])
    return picked


def _targeted(targeting: Targeting, paths: Sequence[str], budget: Budget) -> set[str]:
    targets, layers = targeting.target_modules, frozenset(targeting.layers_to_transform or ())
    hit = _listed("target_modules", targets, paths, budget)
    if isinstance(targets, str) or not layers:
        return hit
    exact = hit & set(targets)  # layers_to_transform doesn't apply to these
    if exact and len(targets) >= _PEFT_REWRITES_FROM:
        message = f"means nothing sure to PEFT with {_PEFT_REWRITES_FROM} target_modules or more, some whole paths"
        raise BadTargetsError("layers_to_transform", message)
    layer_of = _layers(targeting.layers_pattern, paths, budget)
    return exact | {path for path in hit if layer_of.get(path) in layers}


def _listed(field: str, entries: str | tuple[str, ...], paths: Sequence[str], budget: Budget) -> set[str]:
    if isinstance(entries, str):
        (row,) = _find(field, [Pattern(entries, "fullmatch", entries)], paths, budget)
        return {path for path, found in zip(paths, row, strict=True) if found is not None}
    named = frozenset(entries)
    return {path for path in paths if not named.isdisjoint(_endings(path))}


def _endings(path: str) -> Iterator[str]:
    """The path, and what follows on each of its dots."""
    yield path
    while "." in path:
        _, _, path = path.partition(".")
        yield path


def _layers(layers_pattern: Sequence[str], paths: Sequence[str], budget: Budget) -> dict[str, int]:
    """Each path's layer index, as the first of `layers_pattern` that matches sees it."""
    patterns = [Pattern(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", "match", text) for text in layers_pattern]
    if not patterns:
        patterns = [Pattern(r".*?\.[^.]*\.(?P<idx>\d+)\.", "match", "")]
    layer_of: dict[str, int] = {}
    for row in _find("layers_pattern", patterns, paths, budget):
        for path, found in zip(paths, row, strict=True):
            if found:
                layer_of.setdefault(path, int(found))
    return layer_of


def _find(field: str, patterns: Sequence[Pattern], paths: Sequence[str], budget: Budget) -> list[list[str | None]]:
    try:
        return find(patterns, paths, budget)
    except BadPatternError as error:
        raise BadTargetsError(field, f"{patterns[error.index].user_text[:100]!r}: {error}") from None
