"""An adapter's two files with plausible faults: wrong offsets, shapes, dtypes and lengths, and deep JSON."""

import json
from collections.abc import Sequence

from adapters.lora import ModuleKey
from adapters.peft.tensor_file import tensor_name
from tests.adapters.samples import SHAPE
from tests.stress.fuzzing.choices import NUMBERS, Choices, encoded, nested
from tests.stress.fuzzing.target import Target
from tests.stress.fuzzing.targets.adapter_bytes import check

KEYS = (
    *("peft_type", "task_type", "bias", "lora_dropout", "init_lora_weights", "r", "lora_alpha", "use_rslora"),
    *(
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    ),
    *("base_model_name_or_path", "modules_to_save", "use_dora", "lora_bias", "peft_version", "surprise"),
)
VALUES: Sequence[object] = (
    *(
        "LORA",
        "CAUSAL_LM",
        "none",
        "q_proj",
        "all-linear",
        "model\\.layers\\.\\d+\\..*",
        "(a|a)*$",
        "pissa_niter_4",
    ),
    *(["q_proj"], ["q_proj", "v_proj"], ["lm_head"], ["model.layers.0.self_attn.q_proj"], [0], [2, 1], [10**30]),
    *({"q_proj": 2}, {"layers.1.q_proj": 1, "v_proj": 3}, {"(": 1}, {"a": 10**400}, "layers", ["layers", "h"]),
)
DTYPES = ("F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "", "f32")
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
MODULES = ("q_proj", "v_proj", "up_proj", "down_proj")


def run(data: bytes) -> str:
    choices = Choices(data)
    modules = [MODULES[index] for index in range(len(MODULES)) if choices.below(2) or index == 0]
    rank = choices.pick((1, 2, 4))
    return check(encoded(_config(choices, modules, rank), choices), _tensors(choices, modules, rank))


def _config(choices: Choices, modules: Sequence[str], rank: int) -> object:
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": modules,
    }
    for _ in range(choices.below(4)):
        config[choices.pick(KEYS)] = choices.json() if choices.one_in(3) else choices.pick(VALUES)
    return nested(2000) if choices.one_in(64) else config


def _tensors(choices: Choices, modules: Sequence[str], rank: int) -> bytes:
    header: dict[str, object] = {}
    at = 0
    for layer in range(SHAPE.num_layers):
        for module in modules:
            num_out, num_in = SHAPE.features[module]
            for side, shape in (("A", [rank, num_in]), ("B", [num_out, rank])):
                dtype = choices.pick(DTYPES) if choices.one_in(48) else "F32"
                end = at + shape[0] * shape[1] * _SIZES.get(dtype, 1)
                name = tensor_name(ModuleKey(layer, module), "A" if side == "A" else "B")
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
                at = end
    for _ in range(choices.below(3)):
        _lie(choices, header)
    text = encoded(header, choices)
    if choices.one_in(64):
        text = choices.pick(
            (b"[" * 70_000, b'{"a":' * 70_000, b"{" + b" " * 70_000 + b"}", b'{"__metadata__":{}}')
        )
    length = len(text)
    if choices.one_in(12):
        length = choices.pick((0, length - 1, length + 1, 8 << 20, (8 << 20) + 1, 1 << 63, (1 << 64) - 1))
    content = (choices.some() * 1000)[:at].ljust(at, b"\0")
    if choices.one_in(12):
        content = content[: choices.below(max(1, at))] + choices.some()
    return max(0, length).to_bytes(8, "little") + text + content


def _lie(choices: Choices, header: dict[str, object]) -> None:
    name = choices.pick(list(header)) if header else "a"
    entry = header.get(name)
    what = choices.below(7)
    if what == 0 or not isinstance(entry, dict):
        header[name] = choices.json()
    elif what == 1:
        entry["shape"] = [choices.pick(NUMBERS) for _ in range(choices.below(10))]
    elif what == 2:
        entry["data_offsets"] = [choices.pick(NUMBERS), choices.pick(NUMBERS)]
    elif what == 3:
        entry["dtype"] = choices.json(1)
    elif what == 4:
        header[choices.text()] = header.pop(name)
    elif what == 5:
        header["__metadata__"] = choices.json(2)
    else:
        del header[name]


def seeds() -> list[bytes]:
    return [
        b"",
        bytes([0, 1, 0, 1]),
        bytes(range(64)),
        bytes(range(255, 0, -1)),
        json.dumps(VALUES).encode()[:400],
    ]


TARGET = Target(run, seeds, max_len=512, cpu_seconds=2.0)
