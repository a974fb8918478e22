"""Converted weights compared with their Hugging Face directories, tensor by tensor and bit by bit."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from server.errors import StartupError
from server.model.base.export import export_hugging_face, split
from server.model.base.source import resolve_base
from server.model.base.weights import WEIGHTS, BaseModel, BaseWeights, digest_of, load_base
from tests.kits.tiny import save_tiny_base, tiny_tokenizer

ODD = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 515,
}
KINDS = [
    ("llama", {}),
    ("llama", {**ODD, "tie_word_embeddings": False}),
    ("smollm3", {**ODD, "num_hidden_layers": 5}),
]


def load(hf_dir: Path, dtype: torch.dtype | None = None) -> BaseModel:
    return load_base(resolve_base(str(hf_dir), hf_dir.parent), dtype)


def hugging_face(directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert isinstance(model, PreTrainedModel)
    return model  # in evaluation mode already


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor) for name, tensor in theirs.items()
    )


@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_every_tensor_is_the_one_transformers_loads(
    tmp_path: Path, architecture: str, options: dict[str, object]
) -> None:
    directory = save_tiny_base(tmp_path / "tiny", architecture, options)
    base = load(directory)
    theirs = hugging_face(directory).state_dict()
    if base.config.tie_word_embeddings:
        assert base.weights.lm_head is base.weights.embed
        del theirs["lm_head.weight"]
    assert same_bits(dict(split(base.config, base.weights)), theirs)
    attention = "model.layers.1.self_attn."
    stacked = torch.cat([theirs[f"{attention}{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(base.weights.layers[1].qkv, stacked)
    stacked = torch.cat([theirs[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(base.weights.layers[1].gate_up, stacked)
    assert base.weights.num_parameters == sum(tensor.numel() for tensor in theirs.values())


@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_export_computes_the_same_as_the_original(
    tmp_path: Path, architecture: str, options: dict[str, object]
) -> None:
    directory = save_tiny_base(tmp_path / "tiny", architecture, options)
    export_hugging_face(load(directory), tmp_path / "exported")
    ids = torch.tensor([[1, 40, 300, 7, 99]])
    with torch.no_grad():
        expected, exported = (hugging_face(tmp_path / name)(ids).logits for name in ("tiny", "exported"))
    assert torch.equal(exported, expected)
    text = "x  12 3 é<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")(text).input_ids == tiny_tokenizer()(text).input_ids


def test_an_export_takes_other_weights_and_another_dtype(tiny_base: BaseModel, tmp_path: Path) -> None:
    doubled = BaseWeights(
        embed=(embed := tiny_base.weights.embed * 2),
        layers=tuple(replace(layer, down=layer.down * 3) for layer in tiny_base.weights.layers),
        final_norm=tiny_base.weights.final_norm,
        lm_head=embed,
    )
    export_hugging_face(replace(tiny_base, weights=doubled), tmp_path / "tuned", torch.bfloat16)
    written = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["model.embed_tokens.weight"], embed.bfloat16())
    down = tiny_base.weights.layers[2].down
    assert torch.equal(written["model.layers.2.mlp.down_proj.weight"], (down * 3).bfloat16())
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("options", [{}, ODD])
def test_tensors_are_aligned_views_of_the_mapped_file(tmp_path: Path, options: dict[str, object]) -> None:
    base = load(save_tiny_base(tmp_path / "tiny", options=options))
    maps = Path("/proc/self/maps").read_text()
    spans = [
        (int(start, 16), int(end, 16))
        for start, end, file in re.findall(r"^(\w+)-(\w+) .* (/.*)$", maps, re.MULTILINE)
        if file == str(base.directory / WEIGHTS)
    ]
    for name, tensor in base.weights.tensors():
        assert tensor.data_ptr() % 64 == 0, name
        last = tensor.data_ptr() + tensor.nbytes
        assert any(start <= tensor.data_ptr() and last <= end for start, end in spans), name


def test_a_sharded_directory_is_the_same_base(tmp_path: Path) -> None:
    whole = save_tiny_base(tmp_path / "whole")
    sharded = shutil.copytree(whole, tmp_path / "sharded")
    hugging_face(whole).save_pretrained(sharded, max_shard_size="60KB")
    (sharded / "model.safetensors").unlink()
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert load(sharded).digest == load(whole).digest
    next(sharded.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(StartupError, match=r"names missing files: model-00002-"):
        load(sharded)


def test_casting_to_another_dtype_at_loading(tiny_base: BaseModel) -> None:
    cast = load_base(tiny_base.directory, torch.bfloat16)
    assert (cast.dtype, cast.digest) == (torch.bfloat16, tiny_base.digest)
    for (name, ours), (_, theirs) in zip(cast.weights.tensors(), tiny_base.weights.tensors(), strict=True):
        assert torch.equal(ours, theirs.bfloat16()), name
    assert cast.weights.num_bytes * 2 == tiny_base.weights.num_bytes


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loading_on_a_gpu(tiny_base: BaseModel) -> None:
    there = load_base(tiny_base.directory, torch.bfloat16, "cuda")
    assert there.device.type == "cuda"
    assert there.weights.lm_head is there.weights.embed
    for (name, ours), (_, theirs) in zip(there.weights.tensors(), tiny_base.weights.tensors(), strict=True):
        assert torch.equal(ours.cpu(), theirs.bfloat16()), name


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    directory = save_tiny_base(tmp_path / "tiny")
    state = load_file(directory / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].double()
    save_file(state, directory / "model.safetensors")
    with pytest.raises(StartupError, match=r"norm\.weight is stored as F64, and only F32, F16, BF16 are read"):
        load(directory)


def test_mixed_dtypes_are_kept_exactly(tmp_path: Path) -> None:
    directory = save_tiny_base(tmp_path / "tiny")
    state = load_file(directory / "model.safetensors")
    state = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in state.items()}
    save_file(state, directory / "model.safetensors")
    base = load(directory)
    assert same_bits(
        dict(split(base.config, base.weights)), {name: tensor.float() for name, tensor in state.items()}
    )


def test_the_digest_covers_every_bit_of_weights_and_sizes(tiny_base: BaseModel, tmp_path: Path) -> None:
    assert tiny_base.digest == digest_of(tiny_base.config, tiny_base.weights)
    assert tiny_base.digest == load(save_tiny_base(tmp_path / "again")).digest
    assert tiny_base.digest != load(save_tiny_base(tmp_path / "other", seed=1)).digest
    assert tiny_base.digest != digest_of(replace(tiny_base.config, rope_theta=10001.0), tiny_base.weights)
    flipped = tiny_base.weights.final_norm.clone()
    flipped.view(torch.int32)[-1] ^= 1
    assert tiny_base.digest != digest_of(tiny_base.config, replace(tiny_base.weights, final_norm=flipped))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    directory = save_tiny_base(tmp_path / "tiny")
    file = directory / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    del state["model.norm.weight"]
    save_file(state, file)
    with pytest.raises(StartupError) as refusal:
        load(directory)
    assert "q_proj.bias is unknown" in str(refusal.value)
    assert "up_proj.weight has shape [95, 64], not [96, 64]" in str(refusal.value)
    assert "model.norm.weight is missing" in str(refusal.value)
    assert not [path for path in tmp_path.glob("models/*") if path.is_dir()]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"[]", "config.json is not a JSON object"),
        ("config.json", b"{", "config.json is not valid JSON"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", b"{}", "the tokenizer can't be read"),
        ("model.safetensors", None, "no model.safetensors"),
        ("model.safetensors", b"\x00" * 20, "can't be read as safetensors"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}', "names missing files"),
    ],
)
def test_broken_directories_are_one_line(
    tiny_base_dir: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    directory = shutil.copytree(tiny_base_dir, tmp_path / "broken")
    (directory / file).unlink(missing_ok=True)
    if content is not None:
        (directory / file).write_bytes(content)
    with pytest.raises(StartupError, match=re.escape(message)) as refusal:
        load(directory)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    directory = save_tiny_base(tmp_path / "tiny", options={"vocab_size": 500})
    with pytest.raises(StartupError, match="the tokenizer has 512 tokens, the model only 500"):
        load(directory)


def sentencepiece() -> Tokenizer:
    """A tokenizer like Llama 2's: a space is U+2581, and an unknown byte is spelled out."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *spelled, "▁", "a"]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    """From a directory, or from a home that converted it earlier: answers would contain `<0x0A>` and lack
    spaces."""
    directory = save_tiny_base(tmp_path / "tiny")
    converted = load(directory).directory
    for place, name in ((directory, "tiny"), (converted, converted.name)):
        sentencepiece().save(str(place / "tokenizer.json"))
        with pytest.raises(StartupError, match=rf"^{name}: the tokenizer is not byte-level"):
            load_base(place) if place == converted else load(directory)


def test_loading_an_unconverted_directory(tiny_base_dir: Path) -> None:
    with pytest.raises(StartupError, match="not a converted base"):
        load_base(tiny_base_dir)
