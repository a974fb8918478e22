"""An adapter's two files with any bytes: refused with the bad keys, or read and written back equal."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.errors import FieldError, InvalidAdapter
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME, PeftAdapter, read, write
from tests.adapters.samples import SHAPE, sample_adapter
from tests.stress.fuzzing.target import Target, check_refusal

_LENGTH = 2  # bytes of an input that hold the length of its config


def joined(config: bytes, tensors: bytes) -> bytes:
    """Join the two files into one input."""
    return len(config).to_bytes(_LENGTH, "little") + config + tensors


def run(data: bytes) -> str:
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    return check(data[_LENGTH:end], data[end:])


def check(config: bytes, tensors: bytes) -> str:
    """Read the files. Raise AssertionError if writing them back gives another adapter."""
    try:
        adapter = read(config, tensors, SHAPE)
    except InvalidAdapter as error:
        check_refusal(error)
        _check_places(error.errors)
        return "refused"
    for key, module in adapter.weights.modules.items():
        num_out, num_in = SHAPE.features[key.module]
        assert module.a.shape == (module.rank, num_in)
        assert module.b.shape == (num_out, module.rank)
        assert torch.isfinite(module.a).all()
        assert torch.isfinite(module.b).all()
        assert (module.rank, module.scaling) == (adapter.config.rank_of(key), adapter.config.scaling_of(key))
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), adapter)
        _check_same(adapter, read(*files_in(Path(scratch)), SHAPE))
    return "read"


def files_in(directory: Path) -> tuple[bytes, bytes]:
    return (directory / CONFIG_NAME).read_bytes(), (directory / WEIGHTS_NAME).read_bytes()


def _check_places(faults: Sequence[FieldError]) -> None:
    assert {fault.loc[0] for fault in faults} <= {"adapter_config", "adapter_model"}


def _check_same(one: PeftAdapter, other: PeftAdapter) -> None:
    assert one.base_model == other.base_model
    assert one.weights.modules.keys() == other.weights.modules.keys()
    for key, module in one.weights.modules.items():
        again = other.weights.modules[key]
        assert module.scaling == again.scaling
        assert torch.equal(module.a, again.a)
        assert torch.equal(module.b, again.b)


def seeds() -> list[bytes]:
    found: list[bytes] = []
    for rank, names in ((1, ("q_proj",)), (2, ("v_proj", "down_proj"))):
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch), sample_adapter(0, rank, names))
            config, tensors = files_in(Path(scratch))
            found += [joined(config, tensors), joined(config, tensors[:-1]), joined(config, b"")]
    config_of_all = config.replace(b'"v_proj"', b'"all-linear"').replace(b'"down_proj"', b'"lm_head"')
    pattern = config.replace(b'"rank_pattern": {}', b'"rank_pattern": {"layers.1.q_proj": 4, ".*o_proj": 2}')
    return [*found, joined(config_of_all, tensors), joined(pattern, tensors)]


TARGET = Target(
    run,
    seeds,
    max_len=16_384,
    words=(
        b'"data_offsets":[0,',
        b'"shape":[',
        b'"dtype":"F32"',
        b'"BF16"',
        b'"__metadata__"',
        b"lora_A.weight",
        b'"r": ',
        b'"target_modules"',
        b'"all-linear"',
        b'"layers_to_transform"',
        b'"rank_pattern"',
        b"null",
        b"1e999",
    ),
    cpu_seconds=2.0,  # half a second of it for their regular expressions, in a process of its own
)
