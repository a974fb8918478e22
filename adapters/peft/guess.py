"""What a file of tensors looks like, beside what adapter_config.json and the base say: one line, for people.

Where hundreds of tensors are at fault, one thing is wrong: another rank, other modules, another base. It is
guessed from names and shapes alone, which may be those of any model's adapter.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from adapters.lora import MODULES, BaseShape, ModuleKey
from adapters.peft.tensor_file import TensorEntry
from adapters.strict_json import printable

_LORA = re.compile(r"([AB])(?:\.\w+)?\.weight", re.ASCII)  # behind ".lora_"
_LAYER = re.compile(r"\d{1,6}", re.ASCII)
_MODULE = re.compile(r"\w{1,64}", re.ASCII)
_SHOWN = 3


def guess(
    entries: Mapping[str, TensorEntry], base: BaseShape, ranks: Mapping[ModuleKey, int] | None
) -> str | None:
    """How the tensors differ from the configuration's `ranks` (None: it is at fault itself) and from the base.

    None where nothing of use can be said.
    """
    found: dict[str, set[int]] = {}
    layers: set[int] = set()
    widths: set[int] = set()
    for name, entry in entries.items():
        place = place_of(name)
        if place is None or len(entry.shape) != 2:
            continue
        layer, module, is_a = place
        layers.add(layer)
        found.setdefault(module, set()).add(entry.shape[0 if is_a else 1])
        if is_a and module in base.features:
            widths.add(entry.shape[1] - base.features[module][1])
    if not found:
        if not entries:
            return "has no tensors: was the adapter saved before it was trained?"
        example = printable(next(iter(entries)), 80)
        return f"its tensors don't look like LoRA's: none has lora_A or lora_B in its name, such as {example}"
    looks = f"the tensors look like {_modules(found)}"
    if widths and 0 not in widths:
        width = base.features["q_proj"][1]
        return f"{looks}, for another base: this one's modules read {width} numbers, these {_wide(widths, width)}"
    if max(layers) >= base.num_layers:
        return (
            f"{looks}, for another base: they go up to layer {max(layers)}, this one's up to {base.num_layers - 1}"
        )
    if ranks is None:
        return looks
    said: dict[str, set[int]] = {}
    for key, rank in ranks.items():
        said.setdefault(key.module, set()).add(rank)
    advice = "use the adapter_config.json that was saved with them, or set r and target_modules to match"
    if said != found:
        return f"{looks}; adapter_config.json says {_modules(said)}: {advice}"
    wanted = {key.layer for key in ranks}
    if wanted != layers:
        return f"{looks}, {_layers(layers)}; adapter_config.json says {_layers(wanted)}: set layers_to_transform"
    return looks


def place_of(name: str) -> tuple[int, str, bool] | None:
    """(layer, module, whether it is A) of a tensor of LoRA's, in time that grows with the name and no faster: a
    stranger's may have megabytes."""
    path, _, end = name.rpartition(".lora_")
    *above, module = path.split(".")
    layer = next(filter(_LAYER.fullmatch, above[1:]), None)
    lora = _LORA.fullmatch(end)
    if lora is None or layer is None or not _MODULE.fullmatch(module):
        return None
    return int(layer), module, lora[1] == "A"


def _wide(differences: Iterable[int], width: int) -> str:
    return _list([str(width + difference) for difference in sorted(differences)])


def _modules(ranks: Mapping[str, set[int]]) -> str:
    """As in "rank 8 on q_proj and v_proj, ranks 4 and 16 on o_proj"."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for module in sorted(ranks, key=lambda name: (MODULES.index(name) if name in MODULES else len(MODULES), name)):
        alike.setdefault(tuple(sorted(ranks[module])), []).append(module)
    told = [
        f"{'rank' if len(numbers) == 1 else 'ranks'} {_list(list(map(str, numbers)))} on {_list(modules, 7)}"
        for numbers, modules in alike.items()
    ]
    return _list(told)


def _layers(numbers: set[int]) -> str:
    first, last = min(numbers), max(numbers)
    if len(numbers) == 1:
        return f"layer {first}"
    return f"layers {first} to {last}" + ("" if len(numbers) == last - first + 1 else ", not all of them")


def _list(words: Sequence[str], limit: int = _SHOWN) -> str:
    """As in "a, b and c", or "a, b and 7 more"."""
    if len(words) > limit:
        words = [*words[: limit - 1], f"{len(words) - limit + 1} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
