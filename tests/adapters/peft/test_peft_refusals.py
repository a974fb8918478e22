"""Tests that files which can't be reproduced exactly are refused, with an error for every key at fault."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import load_file, save

from adapters.errors import InvalidAdapter
from adapters.lora import ModuleKey
from adapters.peft.files import CONFIG_NAME, MAX_CONFIG_ERRORS, MAX_TENSOR_ERRORS, WEIGHTS_NAME, read
from adapters.peft.tensor_file import tensor_name
from tests.adapters.oracle import loaded, saved, shape_of, tiny_llama
from tests.kits.oracles.hugging_face import linear
from tests.kits.properties import num_examples

BASE = shape_of(tiny_llama())
A = tensor_name(ModuleKey(1, "q_proj"), "A")
B = tensor_name(ModuleKey(1, "q_proj"), "B")
Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Tensors]:
    """A valid adapter of q_proj and up_proj that PEFT saved."""
    config = PeftLoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    _, directory = saved(tmp_path_factory.mktemp("sound"), config)
    return json.loads((directory / CONFIG_NAME).read_bytes()), load_file(directory / WEIGHTS_NAME)


def faults(config: object, tensors: Tensors | bytes) -> dict[tuple[str | int, ...], str]:
    config_json = config if isinstance(config, bytes) else json.dumps(config).encode()
    with pytest.raises(InvalidAdapter) as caught:
        read(config_json, tensors if isinstance(tensors, bytes) else save(tensors), BASE)
    json.dumps([error.loc for error in caught.value.errors]).encode()
    str(caught.value).encode()
    return {error.loc: error.message for error in caught.value.errors}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "LOHA", 'must be "LORA"'),
        ("peft_type", None, 'must be "LORA"'),
        ("task_type", "SEQ_CLS", "head"),
        ("task_type", ["CAUSAL_LM"], "head"),
        ("use_dora", True, "DoRA"),
        ("bias", "lora_only", "biases"),
        ("bias", "all", "biases"),
        ("lora_bias", True, "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("trainable_token_indices", [1, 2], "embeddings"),
        ("layer_replication", [[0, 2], [1, 3]], "repeated"),
        ("fan_in_fan_out", True, "fan_in_fan_out"),
        ("megatron_config", {"a": 1}, "isn't known"),
        ("target_parameters", ["x"], "parameters"),
        ("use_qalora", True, "isn't known"),
        ("use_bdlora", {"nblocks": 2}, "isn't known"),
        ("alora_invocation_tokens", [5], "isn't known"),
        ("arrow_config", {"top_k": 2}, "isn't known"),
        ("kasa_config", {"beta": 1}, "isn't known"),
        ("from_the_future", 0, "isn't known"),
        ("from_the_future", "x", "isn't known"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "OLoRA", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "lora_ga", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "surprise", "must be true, false or one of"),
        ("init_lora_weights", 1, "must be true, false or one of"),
        ("r", 0, "whole number above 0"),
        ("r", -4, "whole number above 0"),
        ("r", True, "whole number above 0"),
        ("r", 4.0, "whole number above 0"),
        ("r", 10**400, "whole number above 0"),
        ("lora_alpha", 0, "number above 0"),
        ("lora_alpha", -8.0, "number above 0"),
        ("lora_alpha", None, "number above 0"),
        ("lora_alpha", "8", "number above 0"),
        ("lora_dropout", 2, "from 0 to 1"),
        ("use_rslora", "yes", "true or false"),
        ("rank_pattern", {"q_proj": 0}, "'q_proj' must be a whole number"),
        ("rank_pattern", ["q_proj"], "must be an object"),
        ("rank_pattern", {"(": 4}, "no regular expression"),
        ("alpha_pattern", {"q_proj": "8"}, "'q_proj' must be a number"),
        ("alpha_pattern", {"\ud800": None}, "'\\ud800' must be a number"),
        ("target_modules", None, "list of modules' names"),
        ("target_modules", [], "list of modules' names"),
        ("target_modules", ["q_proj", 1], "list of modules' names"),
        ("target_modules", ["c_attn"], "matches no linear module"),
        ("target_modules", ["q_proj", "up_proj", "lm_head"], "reaches lm_head"),
        ("target_modules", ["q_proj", "up_proj", "embed_tokens"], "reaches model.embed_tokens"),
        ("target_modules", "[", "no regular expression"),
        ("exclude_modules", {"a": 1}, "list of modules' names"),
        ("layers_to_transform", ["1"], "layers' numbers"),
        ("layers_to_transform", True, "layers' numbers"),
        ("layers_pattern", "layers", "needs layers_to_transform"),
        ("layers_pattern", [1], "a string or a list"),
        ("base_model_name_or_path", 1, "printable"),
        ("base_model_name_or_path", "a\nb", "printable"),
    ],
)
def test_invalid_config_keys_are_refused(
    key: str, value: object, message: str, files: tuple[Config, Tensors]
) -> None:
    config, tensors = files
    found = faults(config | {key: value}, tensors)
    assert set(found) == {("adapter_config", key)}
    assert message in found["adapter_config", key]


@pytest.mark.parametrize("key", ["layers_to_transform", "layers_pattern"])
def test_layers_are_refused_with_an_expression(key: str, files: tuple[Config, Tensors]) -> None:
    config, tensors = files
    found = faults(config | {"target_modules": ".*(q|up)_proj", key: [0]}, tensors)
    assert set(found) == {("adapter_config", key)}


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_missing_config_keys_are_refused(key: str, files: tuple[Config, Tensors]) -> None:
    config, tensors = files
    assert set(faults({k: v for k, v in config.items() if k != key}, tensors)) == {("adapter_config", key)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[]", "must be a JSON object"),
        (b'{"r": 4', "character 8"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": -Infinity}', "-Infinity"),
        (b'{"lora_alpha": 1e999}', "too large"),
        (b'{"r": ' + b"9" * 5000 + b"}", "too long"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"r": 4, "r": 8}', "'r' twice"),
        (b" " * (1 << 20) + b"{}", "bytes long"),
    ],
)
def test_invalid_config_files_are_refused(text: bytes, message: str, files: tuple[Config, Tensors]) -> None:
    found = faults(text, files[1])
    assert set(found) == {("adapter_config",)}
    assert message in found["adapter_config",]


def name(layer: int, block: str, end: str) -> str:
    return f"base_model.model.model.layers.{layer}.{block}.{end}"


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({A: None}, {A}, "is missing"),
        ({B: None}, {B}, "is missing"),
        ({A: None, B: None}, {A, B}, "is missing"),
        ({A: torch.zeros(4, 35)}, {A}, "shape (4, 35), this base needs (rank, 36)"),
        ({B: torch.zeros(4, 30)}, {B}, "shape (4, 30), this base needs (30, rank)"),
        ({A: torch.zeros(4, 36, 1)}, {A}, "shape (4, 36, 1)"),
        ({A: torch.zeros(0, 36)}, {A}, "shape (0, 36)"),
        ({A: torch.tensor(1.0)}, {A}, "shape ()"),
        ({A: torch.zeros(5, 36)}, {A}, "rank 5, but the configuration says 4"),
        ({A: torch.zeros(5, 36), B: torch.zeros(30, 5)}, {A, B}, "rank 5, but the configuration says 4"),
        ({A: torch.zeros(4, 36, dtype=torch.int8)}, {A}, "dtype I8"),
        ({A: torch.zeros(4, 36, dtype=torch.float64)}, {A}, "dtype F64"),
        ({A: torch.zeros(4, 36).to(torch.float8_e4m3fn)}, {A}, "dtype F8_E4M3"),
        ({A: torch.full((4, 36), float("nan"))}, {A}, "NaN"),
        ({B: torch.full((30, 4), -float("inf")).half()}, {B}, "infinite"),
        ({name(7, "self_attn", "q_proj.lora_A.weight"): torch.zeros(4, 36)}, None, "has 3 layers"),
        ({name(0, "self_attn", "k_proj.lora_A.weight"): torch.zeros(4, 36)}, None, "doesn't target"),
        ({name(0, "mlp", "q_proj.lora_A.weight"): torch.zeros(4, 36)}, None, "is no A or B"),
        ({A.replace(".1.", ".01."): torch.zeros(4, 36)}, None, "is no A or B"),
        ({A.replace(".1.", ".\u0661."): torch.zeros(4, 36)}, None, "is no A or B"),
        ({A.replace("lora_A", "lora_A.default"): torch.zeros(4, 36)}, None, "is no A or B"),
        ({A.removeprefix("base_model.model."): torch.zeros(4, 36)}, None, "is no A or B"),
        ({A + "\n": torch.zeros(4, 36)}, {A + "\\n"}, "is no A or B"),
        ({"x" * 1000: torch.zeros(1)}, {"x" * 200 + "…"}, "is no A or B"),
        ({name(0, "self_attn", "q_proj.lora_magnitude_vector"): torch.zeros(30)}, None, "DoRA"),
        ({name(0, "self_attn", "q_proj.lora_B.bias"): torch.zeros(30)}, None, "bias"),
        ({"base_model.model.lm_head.weight": torch.zeros(71, 36)}, None, "embeddings"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 71)}, None, "embeddings"),
    ],
)
def test_invalid_tensors_are_refused(
    change: dict[str, torch.Tensor | None], where: set[str] | None, message: str, files: tuple[Config, Tensors]
) -> None:
    config, tensors = files
    changed = {key: value for key, value in (tensors | change).items() if value is not None}
    found = faults(config, changed)
    assert set(found) == {("adapter_model", key) for key in (where or change)}
    assert all(message in text for text in found.values())


@pytest.mark.parametrize(
    ("called", "way"),
    [
        (
            A.replace("lora_A", "lora_A.default"),
            "save the adapter with PEFT's model.save_pretrained",
        ),  # state_dict()
        (A.removeprefix("base_model.model."), "save the adapter with PEFT's model.save_pretrained"),
        (A.replace("base_model.model.", "base_model.model._orig_mod."), "take '_orig_mod.' out of all names"),
    ],
)
def test_errors_name_the_right_tensor_name(called: str, way: str, files: tuple[Config, Tensors]) -> None:
    config, tensors = files
    others = {key: value for key, value in tensors.items() if key != A}
    found = faults(config, others | {called: tensors[A]})
    assert set(found) == {("adapter_model", A), ("adapter_model", called)}  # one is missing, one is unexpected
    assert f"it must be {A}; {way}" in found["adapter_model", called]


def test_errors_say_how_to_save_without_embeddings(tmp_path: Path, files: tuple[Config, Tensors]) -> None:
    """PEFT saves them automatically if tokens were added."""
    model, _ = saved(tmp_path, PeftLoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "with"), save_embedding_layers=True)
    found = faults(files[0], load_file(tmp_path / "with" / WEIGHTS_NAME))
    assert found
    assert all("save_embedding_layers=False" in message for message in found.values())
    model.save_pretrained(str(tmp_path / "without"), save_embedding_layers=False)
    read(json.dumps(files[0]).encode(), tmp_path / "without" / WEIGHTS_NAME, BASE)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_untrained_biases_are_refused_with_advice(bias: Literal["all", "lora_only"], tmp_path: Path) -> None:
    """They change nothing: the error says which key to set, and the result is read."""
    config = PeftLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", bias=bias)
    _, directory = saved(tmp_path, config)
    written, tensors = json.loads((directory / CONFIG_NAME).read_bytes()), load_file(directory / WEIGHTS_NAME)
    assert 'set it to "none"' in faults(written, tensors)["adapter_config", "bias"]
    read(json.dumps(written | {"bias": "none"}).encode(), save(tensors), BASE)


def test_an_adapter_of_another_base_is_refused_tensor_by_tensor(files: tuple[Config, Tensors]) -> None:
    config, tensors = files
    wider = {key: torch.cat([value, value], dim=1 if ".lora_A." in key else 0) for key, value in tensors.items()}
    named = faults(config, wider)
    assert "for another base" in named.pop(("adapter_model",))
    assert len(named) == MAX_TENSOR_ERRORS
    assert set(named) < {("adapter_model", key) for key in tensors}


def test_all_faults_of_both_files_are_named_at_once(files: tuple[Config, Tensors]) -> None:
    config, tensors = files
    found = faults(
        config | {"use_dora": True, "bias": "all"}, tensors | {A: torch.ones(4, 3), "lm_head": torch.ones(1)}
    )
    assert set(found) == {
        ("adapter_config", "use_dora"),
        ("adapter_config", "bias"),
        ("adapter_model", A),
        ("adapter_model", "lm_head"),
    }


def test_a_file_without_tensors_is_refused(files: tuple[Config, Tensors]) -> None:
    config, tensors = files
    named = faults(config, save({}))
    assert named.pop(("adapter_model",)) == "has no tensors: was the adapter saved before it was trained?"
    assert len(named) == MAX_TENSOR_ERRORS
    assert set(named) < {("adapter_model", key) for key in tensors}
    assert set(faults(config, b"")) == {("adapter_model",)}
    assert set(faults(config, b"PK\3\4 a zip, perhaps")) == {("adapter_model",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"_use_new_zipfile_serialization": True}, "safe_serialization=True"),
        ({"_use_new_zipfile_serialization": False}, "safe_serialization=True"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
)
def test_other_files_are_refused_with_advice(
    content: dict[str, bool] | bytes, message: str, files: tuple[Config, Tensors]
) -> None:
    """Such as an adapter_model.bin of an older PEFT, or a Git LFS pointer."""
    config, tensors = files
    if not isinstance(content, bytes):
        file = BytesIO()
        torch.save(tensors, file, **content)
        content = file.getvalue()
    (error,) = faults(config, content).values()
    assert message in error


def test_the_list_of_errors_is_bounded(files: tuple[Config, Tensors]) -> None:
    config = files[0] | {f"strange_{i}": True for i in range(100)}
    many = {f"x{i}": torch.zeros(1) for i in range(3000)}
    with pytest.raises(InvalidAdapter) as caught:
        read(json.dumps(config).encode(), save(files[1] | many), BASE)
    places = [error.loc[0] for error in caught.value.errors]
    assert places.count("adapter_config") == MAX_CONFIG_ERRORS
    assert places.count("adapter_model") == MAX_TENSOR_ERRORS + 1
    assert caught.value.num_more == 100 - MAX_CONFIG_ERRORS + 3000 - MAX_TENSOR_ERRORS


Q_AND_V = {"target_modules": ["q_proj", "v_proj"]}
RIGHT = "use the adapter_config.json that was saved with them, or set r and target_modules to match"


@pytest.mark.parametrize(
    ("trained", "config", "message"),
    [
        (
            {"r": 8, **Q_AND_V},
            {"r": 16},
            f"rank 8 on q_proj and v_proj; adapter_config.json says rank 16 on q_proj and v_proj: {RIGHT}",
        ),
        (
            {"r": 4, "rank_pattern": {"v_proj": 2}, **Q_AND_V},
            {"rank_pattern": {}, "target_modules": ["down_proj"]},
            f"rank 4 on q_proj and rank 2 on v_proj; adapter_config.json says rank 4 on down_proj: {RIGHT}",
        ),
        (
            {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "layers_to_transform": [0, 1]},
            {"layers_to_transform": [2]},
            "rank 4 on q_proj, k_proj, v_proj and o_proj, layers 0 to 1; adapter_config.json says layer 2: "
            "set layers_to_transform",
        ),
    ],
)
def test_errors_describe_the_file_as_a_whole(
    trained: dict[str, Any], config: Config, message: str, tmp_path: Path
) -> None:
    _, directory = saved(tmp_path, PeftLoraConfig(task_type="CAUSAL_LM", **trained))
    changed = json.loads((directory / CONFIG_NAME).read_bytes()) | config
    found = faults(changed, load_file(directory / WEIGHTS_NAME))
    assert found["adapter_model",] == f"the tensors look like {message}"


def test_errors_recognize_another_base(files: tuple[Config, Tensors]) -> None:
    config, tensors = files
    wide = {name: torch.zeros(4, 960) if "lora_A" in name else torch.zeros(960, 4) for name in tensors}
    (width,) = {tensor.shape[1] for name, tensor in tensors.items() if "q_proj.lora_A" in name}
    assert faults(config, wide)["adapter_model",] == (
        "the tensors look like rank 4 on q_proj and up_proj, "
        f"for another base: this one's modules read {width} numbers, these 960"
    )
    deep = {name.replace("layers.", "layers.1"): tensor for name, tensor in tensors.items()}
    assert faults(config, deep)["adapter_model",] == (
        "the tensors look like rank 4 on q_proj and up_proj, "
        "for another base: they go up to layer 12, this one's up to 2"
    )
    whole = {f"model.layers.{layer}.mlp.up_proj.weight": torch.zeros(1) for layer in range(12)}
    assert faults(config, whole)["adapter_model",] == (
        "its tensors don't look like LoRA's: none has lora_A or lora_B in its name, "
        "such as model.layers.0.mlp.up_proj.weight"
    )


@pytest.mark.parametrize("key", ["use_dora", "lora_bias"])
def test_variants_that_peft_saved_are_refused(key: str, tmp_path: Path) -> None:
    variant: dict[str, Any] = {key: True}
    _, directory = saved(tmp_path, PeftLoraConfig(r=2, target_modules=["q_proj"], **variant))
    found = faults((directory / CONFIG_NAME).read_bytes(), (directory / WEIGHTS_NAME).read_bytes())
    assert ("adapter_config", key) in found
    assert sum(loc[0] == "adapter_model" for loc in found) == 3  # the magnitude or bias of each layer


@pytest.mark.parametrize(
    ("init", "moves"), [("pissa", True), ("olora", True), ("gaussian", False), ("mica", False), (True, False)]
)
def test_refused_initializations_change_the_frozen_weights(init: Any, moves: bool, tmp_path: Path) -> None:
    """The reason for the rule about `init_lora_weights`, shown with PEFT itself when it loads the files."""
    _, directory = saved(tmp_path, PeftLoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))
    path = "model.layers.0.self_attn.q_proj"
    before = linear(tiny_llama(), path).weight
    after = linear(loaded(directory), f"base_model.model.{path}.base_layer").weight
    assert torch.equal(before, after) != moves
    config, tensors = (directory / CONFIG_NAME).read_bytes(), directory / WEIGHTS_NAME
    if moves:
        with pytest.raises(InvalidAdapter):
            read(config, tensors, BASE)
    else:
        read(config, tensors, BASE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=num_examples(150), deadline=None)
def test_no_value_of_any_key_breaks_the_reader(data: st.DataObject, files: tuple[Config, Tensors]) -> None:
    config, tensors = files
    keys = st.sampled_from(sorted(config.keys() - {"target_modules", "exclude_modules", "layers_pattern"}))
    changed = config | data.draw(st.dictionaries(keys, JSON, min_size=1, max_size=3))
    try:
        adapter = read(json.dumps(changed).encode(), save(tensors), BASE)
    except InvalidAdapter as error:
        assert all(fault.loc[0] in ("adapter_config", "adapter_model") for fault in error.errors)  # noqa: PT017
    else:
        assert len(adapter.weights.modules) == 6
