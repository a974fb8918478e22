"""Peers get the same inputs as our server: GGUF files and packed rows, compared with transformers.

Tests that need a peer's own environment are skipped if `python -m benchmarks.peers make` hasn't made it.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.allocation import TUNABLES
from benchmarks.peers import gguf_files, llama_cpp, openvino, venvs
from benchmarks.peers.__main__ import main as peers_command
from benchmarks.peers.llama_cpp import LlamaCppConfig, LlamaCppServer
from benchmarks.peers.openvino import OpenVino, OpenVinoConfig
from benchmarks.peers.transformers_peft import TransformersPeft
from benchmarks.peers.venvs import LLAMA_CPP, MARK, OPENVINO
from benchmarks.serving.adapter_files import ALPHA, RANK, Sizes, write_adapter
from benchmarks.serving.systems.systems import BASE, BLENDS, DISTINCT, ONE, Facts, Load, OurServer, System
from benchmarks.serving.systems.wires import Part, Request
from server.model.base.export import export_hugging_face
from server.model.base.weights import BaseModel
from tests.kits.cache import CACHE
from tests.kits.oracles.hugging_face import generate
from tests.kits.tiny import save_tiny_base

ROOT = Path(__file__).parents[2]
PROMPT = "404 Not Found. Nothing matches the given URI"
TEXTS = ["HTTP 404 means", "The capital of France is", "def add(a, b):\n    return", "Water boils at"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_base: BaseModel) -> Path:
    """Return the tiny base in bf16, as peers get it."""
    directory = tmp_path_factory.mktemp("peers") / "base"
    export_hugging_face(tiny_base, directory, torch.bfloat16)
    return directory


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(place / name, Sizes.read(base), seed) for seed, name in enumerate(("a", "b"))}


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(np.array(values))
    return found


def test_transformers_reads_back_a_gguf_base(base: Path, tmp_path: Path) -> None:
    gguf_files.write_base(base, tmp_path / "base.gguf")
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="base.gguf")
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert found(PROMPT, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    assert found.convert_ids_to_tokens([*range(512)]) == tokenizer.convert_ids_to_tokens([*range(512)])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


def test_gguf_adapter_is_permuted_like_its_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """W + B A of each module in llama.cpp's order of rows, from two files, equals the same in transformers'
    order."""
    gguf_files.write_base(base, tmp_path / "base.gguf")
    gguf_files.write_adapter(base, adapters["a"], tmp_path / "a.gguf")
    written, weights = tensors_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "base.gguf")
    original = load_file(adapters["a"] / "adapter_model.safetensors")
    assert len(written) == len(original) == 3 * 7 * 2
    plain = load_file(base / "model.safetensors")
    for layer in range(3):
        for path, name in gguf_files.MODULES.items():
            if not path.endswith("proj"):
                continue
            a, b = (
                original[f"base_model.model.model.layers.{layer}.{path}.{which}.weight"].bfloat16().float()
                for which in ("lora_A", "lora_B")
            )
            key = f"blk.{layer}.{name}.weight"
            merged = weights[key] + written[f"{key}.lora_b"] @ written[f"{key}.lora_a"]
            expected = plain[f"model.layers.{layer}.{path}.weight"].float() + b @ a
            order = _rows(name, expected.shape[0])
            torch.testing.assert_close(merged, expected[order], atol=1e-5, rtol=1e-5)


def _rows(name: str, count: int) -> list[int]:
    """Return the rows of transformers' matrix in llama.cpp's order, for heads of 16."""
    if name not in ("attn_q", "attn_k"):
        return list(range(count))
    return [head * 16 + half * 8 + pair for head in range(count // 16) for pair in range(8) for half in range(2)]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", "smollm3")
    with pytest.raises(ValueError, match="other is a smollm3, not a llama"):
        gguf_files.write_base(other, tmp_path / "base.gguf")


def test_loads_supported_by_peers() -> None:
    """Whether a load is supported depends on the peer's requests, not on its speed."""
    loads = [Load(1, BASE), Load(1, BLENDS), Load(4, ONE), Load(4, DISTINCT), Load(4, BLENDS)]

    def can(kind: type[System], *, base_only: bool = False, max_streams: int | None = None) -> list[bool]:
        system = kind.__new__(kind)
        system.__dict__["facts"] = Facts("", "", True, "", {}, base_only, max_streams)
        return [system.can(load) for load in loads]

    assert can(LlamaCppServer) == [True] * 5
    assert can(LlamaCppServer, base_only=True) == [True, False, False, False, False]
    assert can(OurServer) == [True] * 5
    assert can(OurServer, max_streams=1) == [True, True, False, False, False]
    assert can(OpenVino) == [True, True, True, False, False]
    assert can(TransformersPeft) == [True, False, True, True, False]


def test_llama_cpp_gets_every_setting(tmp_path: Path) -> None:
    config = LlamaCppConfig(
        venvs.MadePeer(tmp_path, "1"),
        Path("m.gguf"),
        {"a": Path("a.gguf"), "b": Path("b.gguf")},
        2,
        32,
        100,
        tmp_path,
    )
    line = " ".join(config.command)
    for flags in (
        "--threads 2 --threads-batch 2 --parallel 32 --ctx-size 3200 --cache-ram 0",
        "--flash-attn on --no-kv-unified",
        "--lora a.gguf,b.gguf --lora-init-without-apply",
    ):
        assert flags in line


def test_partially_installed_peer_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "peers" / LLAMA_CPP
    place.mkdir(parents=True)
    assert venvs.find(tmp_path, LLAMA_CPP) is None
    (place / MARK).write_text(json.dumps({"version": "x 1"}))
    found = venvs.find(tmp_path, LLAMA_CPP)
    assert found is not None
    assert (found.version, found.python) == ("x 1", place.resolve() / "bin/python")
    with pytest.raises(SystemExit):
        peers_command(["make", "vllm"])
    assert "vllm" in capsys.readouterr().err


def test_allocator_settings_reach_peers() -> None:
    """Checked in a new process: by default, after our call, and with the setting for processes that can't call
    it."""
    probe = "from benchmarks.allocation import keeps_freed_memory as kept; print(kept())"
    call = "from server.system.memory import keep_freed_memory; keep_freed_memory();"

    def found(code: str, **environment: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert found(probe) == "False"
    assert found(f"{call} {probe}") == "True"
    assert found(probe, GLIBC_TUNABLES=TUNABLES) == "True"


@pytest.fixture(scope="module", params=[LLAMA_CPP, OPENVINO])
def peer(request: pytest.FixtureRequest) -> tuple[str, venvs.MadePeer]:
    made = venvs.find(CACHE, request.param)
    if made is None:
        pytest.skip(f"python -m benchmarks.peers make {request.param}")
    return request.param, made


@pytest.fixture(scope="module")
def real_adapters(hf_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place, sizes = tmp_path_factory.mktemp("real"), Sizes.read(hf_base_dir)
    return {name: write_adapter(place / name, sizes, seed) for seed, name in enumerate(("a", "b"))}


@pytest.fixture(scope="module")
def expected(hf_base_dir: Path, real_adapters: dict[str, Path]) -> list[list[str]]:
    """Return answers of transformers and PEFT in fp32 to each of TEXTS: of the base, of `a` and of a blend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's own call
        return _answers(hf_base_dir, real_adapters, TEXTS)


def exported(made: venvs.MadePeer, base: Path, log: Path) -> Path:
    """Export the base to OpenVINO. This takes ten seconds, so the result is cached by its inputs and versions."""
    made_of = hashlib.sha256(repr((made.version, base.name)).encode())
    made_of.update(Path(openvino.__file__).read_bytes())
    place = CACHE / f"openvino-{made_of.hexdigest()[:16]}"
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            os.replace(openvino.export(made, base, Path(scratch) / "model", log), place)
    return place


@pytest.mark.real
def test_peers_answer_like_transformers(
    peer: tuple[str, venvs.MadePeer],
    hf_base_dir: Path,
    real_adapters: dict[str, Path],
    expected: list[list[str]],
    tmp_path: Path,
) -> None:
    """Base, one adapter and a blend, two streams at once. 16 bits may flip near ties, so most answers must
    agree."""
    (name, made), log = peer, tmp_path / "log"
    system: LlamaCppServer | OpenVino
    if name == LLAMA_CPP:
        gguf_files.write_base(hf_base_dir, tmp_path / "base.gguf")
        files = llama_cpp.adapter_files(hf_base_dir, real_adapters, tmp_path / "gguf")
        system = LlamaCppServer(LlamaCppConfig(made, tmp_path / "base.gguf", files, 2, 2, 256, log))
    else:
        model = exported(made, hf_base_dir, log)
        system = OpenVino(OpenVinoConfig(made, model, real_adapters, ALPHA / RANK, 2, 2, log))
    blends: tuple[tuple[Part, ...], ...] = ((), (Part("a"),), (Part("a", 0.7), Part("b", 0.3)))
    try:
        found = []
        for parts in blends:
            requests = [Request(text, parts, 5) for text in TEXTS]
            run = system.run([requests[0::2], requests[1::2]])
            assert run.num_tokens == 20
            assert len(run.first_token) == 4
            found.append([run.texts[index] for index in (0, 2, 1, 3)])  # they are ordered by stream
    finally:
        system.stop()
    for ours, theirs in zip(found, expected, strict=True):
        assert sum(one == other for one, other in zip(ours, theirs, strict=True)) >= 3, (ours, theirs)
    assert found[0] != found[1], "the adapter is applied"
    assert found[1] != found[2], "the blend is another"


def _answers(base: Path, adapters: dict[str, Path], texts: list[str]) -> list[list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.generation_config.eos_token_id = None

    def answers(model: torch.nn.Module) -> list[str]:
        found = []
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt")
            ids = generate(model, **inputs, max_new_tokens=5, do_sample=False)[0]
            found.append(str(tokenizer.decode(ids[inputs["input_ids"].shape[1] :])))
        return found

    unchanged = answers(plain)
    model = PeftModel.from_pretrained(plain, adapters["a"], "a")
    model.load_adapter(adapters["b"], "b")
    one = answers(model)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "blend", combination_type="cat")
    model.set_adapter("blend")
    return [unchanged, one, answers(model)]
