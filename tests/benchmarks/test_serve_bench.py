"""The serving benchmark's parts, and one reduced run of it on a tiny base."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from adapters.peft.files import read
from benchmarks import serve
from benchmarks.measure import Run
from benchmarks.prompts import PromptSource, library_text
from benchmarks.serving.adapter_files import RANK, Sizes, write_adapter
from benchmarks.serving.load import Answer, Exchange, summarize
from benchmarks.serving.many_adapters import Token, judge
from benchmarks.serving.options import PEERS, parse
from benchmarks.serving.page_cache import drop, read_seconds
from benchmarks.serving.systems.server_process import ServerConfig, adapter_room, import_seconds
from benchmarks.serving.systems.systems import BLENDS, DISTINCT, ONE, OURS, WIDE, Facts, Load, Streams, fastest
from benchmarks.serving.systems.wires import (
    LlamaCpp,
    OpenAiCompletions,
    Part,
    Request,
    Smolora,
    Usage,
    Wire,
    expression,
)
from server.model.base.weights import BaseModel
from server.model.native.model import ROW_FORMAT
from server.model.rank_rows import RowFormat
from tests.kits.native import native_library
from tests.kits.tiny_gguf import save_tiny_gguf


def event(data: Mapping[str, object]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def exchanged(whole: bytes, cut: int) -> Exchange:
    """Return a request whose answer came in two chunks."""
    return Exchange(Request("p", (), 3), sent=10.0, ended=14.0, chunks=[(11.0, whole[:cut]), (14.0, whole[cut:])])


def test_streams_are_parsed_across_chunks() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 1}
    last = {"index": 0, "finish_reason": "length", "usage": usage, "timing": {"queue_ms": 250.0}}
    first = event({"index": 0, "text": "a"})
    whole = first + event({"index": 0, "text": "b\n\n"}) + event(last) + b"data: [DONE]\n\n"
    answer = Answer.of(exchanged(whole, len(first) + 5), Smolora())  # cut inside the second event
    assert answer.text == "ab\n\n"
    assert answer.arrivals == (11.0, 14.0)
    assert answer.usage == Usage(3, 7, 1, 0.25)
    assert summarize([answer]) == Run(3, 4.0, (1.0,), (3.0,), ("ab\n\n",), 1)


def test_streams_of_llama_cpp_are_parsed() -> None:
    first = event({"index": 0, "content": "a", "tokens": [5], "stop": False})
    last = event(
        {"content": "", "stop": True, "tokens_predicted": 2, "tokens_evaluated": 7, "timings": {"cache_n": 4}}
    )
    whole = first + b": a sign of life\n\n" + event({"content": "b", "tokens": [6], "stop": False}) + last
    answer = Answer.of(exchanged(whole, len(first)), LlamaCpp([]))
    assert (answer.text, answer.arrivals, answer.usage) == ("ab", (11.0, 14.0), Usage(2, 7, 4))


@pytest.mark.parametrize(
    ("wire", "failure"),
    [
        (Smolora(), b'event: error\ndata: {"title":"overloaded"}\n\n'),
        (LlamaCpp([]), b'error: {"message":"overloaded"}\n\n'),
    ],
)
def test_a_failed_stream_is_an_error(wire: Wire, failure: bytes) -> None:
    with pytest.raises(RuntimeError, match="overloaded"):
        Answer.of(Exchange(Request("p", (), 3), chunks=[(0.0, failure)]), wire)


def test_request_bodies_of_each_server() -> None:
    blend = (Part("b", 0.7), Part("a", 0.3))
    assert [expression(parts) for parts in ((), (Part("a"),), blend)] == [None, "a", "b*0.7+a*0.3"]
    ours = Smolora().body(Request("p", blend, 3, temperature=0.7, top_p=0.9, logprobs=5))
    assert (ours["adapter"], ours["temperature"], ours["top_p"], ours["logprobs"]) == ("b*0.7+a*0.3", 0.7, 0.9, 5)
    wire = LlamaCpp(["a", "b"])
    theirs = wire.body(Request("p", blend, 3))
    assert theirs["lora"] == [{"id": 1, "scale": 0.7}, {"id": 0, "scale": 0.3}]
    # An empty list would mean all of them, in full.
    assert wire.body(Request("p", (), 3))["lora"] == [{"id": 0, "scale": 0.0}]
    assert LlamaCpp([]).body(Request("p", (), 3))["lora"] == []
    for body in (ours, theirs):
        assert (body["prompt"], body["ignore_eos"], body["stream"]) == ("p", True, True)


def test_vllm_has_an_adapter_as_its_model() -> None:
    wire = OpenAiCompletions("base")
    assert wire.body(Request("p", (), 3))["model"] == "base"
    body = wire.body(Request("p", (Part("a"),), 3))
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("a", 3, True)
    assert wire.read({"choices": [{"text": " x"}], "usage": None}) == " x"
    usage = {"completion_tokens": 3, "prompt_tokens": 5}
    assert wire.read({"choices": [], "usage": usage}) == Usage(3, 5, 0)


def test_the_adapters_of_a_load() -> None:
    names = ["a", "b", "c"]
    assert Load(2, ONE).parts(names) == [(Part("a"),), (Part("a"),)]
    assert Load(2, DISTINCT).parts(names) == [(Part("a"),), (Part("b"),)]
    assert Load(3, BLENDS).parts(names)[2] == (Part("c", 0.7), Part("a", 0.3))


class Fake:
    """A system of a given speed."""

    peak_rss = 0

    def __init__(self, seconds: tuple[float, float], ended: list[str], name: str) -> None:
        self.facts = Facts(name, "", True, "", {})
        self._seconds = seconds
        self._ended = ended

    def can(self, load: Load) -> bool:
        return True

    def run(self, streams: Streams) -> Run:
        return Run(12, self._seconds[len(streams) > 1], (), ())

    def stop(self) -> None:
        self._ended.append(self.facts.name)


def test_peers_get_their_fastest_settings() -> None:
    """One variant is twice as fast for one stream, the other three times as fast for many."""
    request = Request("p", (), 3)
    ended: list[str] = []
    variants = {
        "on": lambda: Fake((1.0, 6.0), ended, "on"),
        "off": lambda: Fake((2.0, 2.0), ended, "off"),
    }
    best, speeds = fastest("peer", variants, [[[request]], [[request], [request]]], lambda line: None)
    assert (best, speeds) == ("off", {"on": (12.0, 2.0), "off": (6.0, 6.0)})
    assert ended == ["on", "off"]


def test_file_is_evicted_from_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 22))
    assert read_seconds(file) > 0
    if not drop(file):
        pytest.skip("this file system keeps its files in memory")
    assert read_seconds(file) > 0
    assert drop(file), "it was read again, and is forgotten again"


def test_answers_are_judged() -> None:
    reference = [
        Token(b"Once", ((b"There", 2.0),)),
        Token(b" upon", ((b" more", 0.1), (b" and", 4.0))),
        Token(b" a", ()),
    ]
    assert judge("Once upon a", reference, 0.3) == "exact"
    assert judge("Once more with feeling", reference, 0.3) == "tie"
    assert judge("Once more with feeling", reference, 0.01) == "wrong"
    assert judge("Once and for all", reference, 0.3) == "wrong"
    assert judge("There was", reference, 0.3) == "wrong"
    assert judge("", reference, 0.3) == "wrong"
    assert judge("Once upon a time", reference, 0.3) == "wrong"
    assert judge("Once up\ufffd", reference, 0.3) == "exact"  # up to the truncated character
    assert judge("Ones\ufffd", reference, 0.3) == "wrong"


def test_prompts_are_distinct_and_of_one_length(tiny_base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base_dir, model_max_length=1 << 30)
    source = PromptSource(tokenizer, library_text()[:20_000])
    prompts = source.take(40, 24)
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    assert {len(ids) for ids in encoded} == {24}
    assert len({tuple(ids[:8]) for ids in encoded}) == 40
    assert source.take(1, 24)[0] not in prompts
    with pytest.raises(ValueError, match="no more than"):
        source.take(100_000, 24)


def test_adapter_files_are_peft_adapters(tmp_path: Path, tiny_base_dir: Path, tiny_base: BaseModel) -> None:
    sizes = Sizes.read(tiny_base_dir)
    one, other = (write_adapter(tmp_path / str(seed), sizes, seed, torch.bfloat16) for seed in (1, 2))
    larger = write_adapter(tmp_path / "larger", sizes, 3, torch.bfloat16, rank=4 * RANK)
    files = [
        ((path / "adapter_config.json").read_bytes(), path / "adapter_model.safetensors")
        for path in (one, other, larger)
    ]
    *weights, four_times = [read(config, tensors, tiny_base.config.shape).weights for config, tensors in files]
    assert four_times.num_parameters == 4 * sizes.num_parameters
    # A sum of four times as many terms is twice as large, and is halved.
    scalings = [{module.scaling for module in each.modules.values()} for each in (weights[0], four_times)]
    assert scalings == [{2.0}, {1.0}]
    assert weights[0].num_parameters == sizes.num_parameters
    assert weights[0].digest != weights[1].digest
    assert {module.rank for module in weights[0].modules.values()} == {RANK}
    assert all(module.b.abs().sum() > 0 for module in weights[0].modules.values())


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    full = parse([])
    assert [load.key for load in full.loads][:4] == ["1-base", "1-one", "1-blends", "8-base"]
    assert (full.num_adapters, full.peers, full.registered, full.pool) == (32, PEERS, 1000, 64)
    some = parse(["--only", "32-base,cold", "--peers", "none"])
    assert [load.key for load in some.loads] == ["32-base"]
    assert (some.wants("cold"), some.wants("many"), some.num_adapters, some.peers) == (True, False, 2, ())
    assert parse(["--only", "many"]).in_rounds is False
    for wrong in (["--only", "33-base"], ["--peers", "sglang"]):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert wrong[1] in capsys.readouterr().err


@pytest.mark.slow
def test_reduced_run(tmp_path: Path, tiny_base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    loads = "1-base,2-base,2-distinct,2-blends"
    places = ["--model", str(tiny_base_dir), "--home", str(tmp_path / "home"), "--out", str(out)]
    places += ["--cache", str(tmp_path / "cache")]
    parts = ["--only", f"{loads},ttft,ways,cold,long,overload,many", "--peers", "peft,llama.cpp"]
    found = serve.main(["--quick", "--dtype", "fp32", "--threads", "1", *parts, *places])
    assert [row.load.key for row in found.rows] == loads.split(",")
    assert all(row.cached_tokens == 0 for row in found.rows)
    peft = "transformers + PEFT"
    # PEFT has no blends; in fp32 all other answers are equal.
    assert [row.same_start for row in found.rows] == [{peft: 1.0}, {peft: 1.0}, {peft: 1.0}, {}]
    assert [list(row.figures) for row in found.rows] == [["smolora", peft]] * 3 + [["smolora"]]
    assert found.missing == {"llama.cpp": "it is measured in bf16 on a CPU"}
    assert min(found.peak_rss.values()) > 100e6
    assert "our allocator's settings" in found.systems[1].settings
    assert "not our" not in found.systems[1].settings
    assert found.many is not None
    assert found.many.verdicts == {"exact": 12, "tie": 0, "wrong": 0}
    assert found.many.control["wrong"] > 0
    assert found.many.num_distinct <= found.many.loads <= found.many.evictions + found.many.most_resident
    assert found.cold is not None
    assert min(found.cold.load_adapter + found.cold.read_cached) > 0
    assert found.long_prompts is not None
    assert found.long_prompts.itl_p99[0] >= found.long_prompts.itl_p50[0] > 0
    assert [ways.streams for ways in found.ways] == [1, 4]
    assert min(found.ways[0].greedy + found.ways[0].sampled + found.ways[0].logprobs) > 0
    assert found.overload is not None
    assert found.overload.offered[0] == pytest.approx(5 * found.overload.peak[0] / 8)
    assert 0 < found.overload.goodput[0] < 2 * found.overload.peak[0]
    assert "measures nothing" not in capsys.readouterr().out
    assert json.loads((out / "serve.json").read_text())["made"]["quick"] is True
    assert sorted(path.name for path in out.iterdir()) == ["serve.json", "serve.log"]


@pytest.mark.slow
def test_quantized_base_is_also_served_in_16_bits(tmp_path: Path) -> None:
    native_library()
    file = tmp_path / "tiny.gguf"
    save_tiny_gguf(file)
    places = ["--model", str(file), "--home", str(tmp_path / "home"), "--out", str(tmp_path / "out")]
    found = serve.main(["--quick", "--threads", "3", "--only", "1-base,2-base", "--peers", "16-bit", *places])
    assert found.settings.weight_bytes < found.settings.wide_bytes
    assert [list(row.figures) for row in found.rows] == [[OURS, WIDE], [OURS]]
    assert found.rows[0].same_start == {WIDE: 1.0}, "expanded weights have the same bits"


def test_server_gets_the_configured_sizes(tmp_path: Path, tiny_base: BaseModel) -> None:
    room = adapter_room(tiny_base.config.shape, "bf16", "cpu", 1000 * RANK)
    assert room == 1000 * RANK * ROW_FORMAT.bytes_per_rank(tiny_base.config.shape)
    assert adapter_room(tiny_base.config.shape, "bf16", "cpu", 0) == 1 << 20, "the server refuses less"
    in_torch = adapter_room(tiny_base.config.shape, "bf16", "cpu", 1000 * RANK, native=False)
    row_format = RowFormat.of_torch(torch.bfloat16, torch.device("cpu"))
    assert in_torch == 1000 * RANK * row_format.bytes_per_rank(tiny_base.config.shape)
    config = ServerConfig(tmp_path, tmp_path, "m", "bf16", "cpu", 1, tmp_path / "log")
    assert not any(word.startswith(("--max-num-seqs", "--adapter-cache-bytes")) for word in config.command)
    given = replace(config, max_num_seqs=64, adapter_cache_bytes=room).command
    assert {"--max-num-seqs=64", f"--adapter-cache-bytes={room}"} <= set(given)


def test_imports_of_a_start_exist() -> None:
    assert import_seconds(threads=1) > 0
