"""Tests that any configuration is read in well under a second of processor time."""

import json
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save

from adapters.errors import InvalidAdapter
from adapters.peft import targets
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME, read
from adapters.peft.targets import linear_modules
from tests.adapters.oracle import saved, shape_of, tiny_llama

BASE = shape_of(tiny_llama())
LIMIT = 0.9
"""Seconds of processor time, of this process and those that it starts; 0.5 of them may be the expressions'."""

ENDLESS = "(.|.)*X"
SLOW = "(?:.*){6}X"  # some milliseconds for each name
MANY_SLOW = {f"(?:.*){{5}}X{number}": 4 for number in range(1000)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], bytes]:
    """The configuration and the tensors' file of an adapter that PEFT saved."""
    config = PeftLoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 1])
    _, directory = saved(tmp_path_factory.mktemp("peft"), config)
    return json.loads((directory / CONFIG_NAME).read_bytes()), Path(directory / WEIGHTS_NAME).read_bytes()


@contextmanager
def little_time() -> Iterator[None]:
    before = _processor_time()
    try:
        yield
    finally:
        assert _processor_time() - before < LIMIT


def _processor_time() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def refusal(files: tuple[dict[str, object], bytes], changes: Mapping[str, object]) -> dict[str, str]:
    """Return the error messages by the configuration's keys."""
    config = {key: value for key, value in {**files[0], **changes}.items() if value is not None}
    with pytest.raises(InvalidAdapter) as caught, little_time():
        read(json.dumps(config).encode(), files[1], BASE)
    return {str(error.loc[1]): error.message for error in caught.value.errors if error.loc[0] == "adapter_config"}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("target_modules", {"target_modules": ENDLESS, "layers_to_transform": None}),
        ("exclude_modules", {"exclude_modules": ENDLESS}),
        ("layers_pattern", {"layers_pattern": ["layers", ENDLESS]}),
        ("rank_pattern", {"rank_pattern": {"q_proj": 4, ENDLESS: 4}}),
        ("alpha_pattern", {"alpha_pattern": {ENDLESS: 4}}),
        ("rank_pattern", {"rank_pattern": MANY_SLOW}),
    ],
)
def test_slow_expressions_are_refused_by_key(
    files: tuple[dict[str, object], bytes], key: str, changes: dict[str, object]
) -> None:
    found = refusal(files, changes)
    assert list(found) == [key]
    assert "too much" in found[key]


def test_the_slow_pattern_is_named(files: tuple[dict[str, object], bytes]) -> None:
    pattern = {"[q]_proj": 4, "u._proj": 4, ENDLESS: 4, "[k]_proj": 4}
    assert refusal(files, {"rank_pattern": pattern})["rank_pattern"].startswith(f"'{ENDLESS}'")


def test_all_keys_share_one_budget(files: tuple[dict[str, object], bytes]) -> None:
    slow = f"{SLOW}|.*"
    changes = {
        "target_modules": "model.*(q_proj|up_proj)",
        "layers_to_transform": None,
        "exclude_modules": f"{SLOW}|.*layers.2.*",
        "rank_pattern": {slow: 4},
        "alpha_pattern": {f"{SLOW}|q_proj": 9},
    }
    with little_time():
        try:
            read(json.dumps({**files[0], **changes}).encode(), files[1], BASE)
        except InvalidAdapter as error:
            assert all(fault.loc[1] in changes for fault in error.errors)  # noqa: PT017


def test_any_number_of_names_is_fast(files: tuple[dict[str, object], bytes]) -> None:
    names = [*(f"{number:x}" for number in range(100_000)), "q_proj", "up_proj"]
    config = {**files[0], "target_modules": names, "layers_to_transform": None, "exclude_modules": ["layers.2.x"]}
    with little_time(), pytest.raises(InvalidAdapter):  # it has tensors of two layers only
        read(json.dumps(config).encode(), files[1], BASE)
    config["exclude_modules"] = [*names[:30_000], "layers.2.self_attn.q_proj", "layers.2.mlp.up_proj"]
    config["target_modules"] = ["q_proj", "up_proj", *names[:30_000]]
    with little_time():
        assert len(read(json.dumps(config).encode(), files[1], BASE).weights.modules) == 4


@pytest.mark.parametrize(
    "entries",
    [
        [f"model.layers.{layer}.self_attn.q_proj" for layer in range(250)],
        ["." * length for length in range(1, 1024)],
        ["q" * 900 + str(number) for number in range(1000)],
        [f"layers.{number}" for number in range(1024)],
    ],
)
def test_many_plain_entries_are_fast(files: tuple[dict[str, object], bytes], entries: list[str]) -> None:
    """Valid ones are read, others may be refused."""
    config = {**files[0], "rank_pattern": dict.fromkeys(entries, 4)}
    if len(str(entries)) < 100_000:  # a configuration may have one megabyte
        config["alpha_pattern"] = dict.fromkeys(entries, 8)
    with little_time():
        try:
            adapter = read(json.dumps(config).encode(), files[1], BASE)
        except InvalidAdapter as error:
            assert entries[0] != "model.layers.0.self_attn.q_proj"
            assert {fault.loc[1] for fault in error.errors} <= {"rank_pattern", "alpha_pattern"}  # noqa: PT017
        else:
            assert len(adapter.weights.modules) == 4


@pytest.mark.parametrize(
    "name", [".1" * 1_000_000 + ".", ".1.a" * 500_000 + ".lora_A", ".lora_A.weight" * 150_000, "." * 2_000_000]
)
def test_a_tensor_name_of_megabytes_is_refused_in_linear_time(
    files: tuple[dict[str, object], bytes], name: str
) -> None:
    """Building the error message takes linear time, too."""
    tensors = save({name: torch.zeros(2, 2)})
    with little_time(), pytest.raises(InvalidAdapter):
        read(json.dumps(files[0]).encode(), tensors, BASE)


def test_the_budget_does_not_depend_on_the_machines_load(files: tuple[dict[str, object], bytes]) -> None:
    """The budget is processor time, so that load doesn't make a valid expression fail."""
    expression = "|".join(rf"model\.layers\.{layer}\.(self_attn\.q_proj|mlp\.up_proj)" for layer in (0, 1))
    config = {**files[0], "target_modules": expression, "layers_to_transform": None}
    started = time.monotonic()
    with little_time():
        adapter = read(json.dumps(config).encode(), files[1], BASE)
    assert len(adapter.weights.modules) == 4
    assert time.monotonic() - started < 30
    assert set(adapter.weights.modules) < set(linear_modules(BASE).values())


def test_the_process_for_expressions_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:password@host/base")
    program = "import json, os\nprint(json.dumps([*os.environ]))\nprint(0.0)"
    monkeypatch.setattr(targets, "_MATCH_THERE", program)
    (names,) = targets._match_there([targets.Pattern("(a|b)", "match", "(a|b)")], ["a"], targets.Budget())
    assert "DATABASE_URL" not in names
