"""The benchmark's own arithmetic, and one reduced run of it on a tiny base."""
# ruff: noqa: RUF001

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from adapters.peft_format import read
from benchmarks import report, serve
from benchmarks.adapter_files import RANK, Sizes, write_adapter
from benchmarks.load import Answer, Exchange, Request, summarize
from benchmarks.many_adapters import Token, judge
from benchmarks.measure import Figures, Run, Spread, join, median_ratio, percentile
from benchmarks.options import parse
from benchmarks.prompts import PromptSource, library_text
from benchmarks.results import (
    BASE,
    BLENDS,
    DISTINCT,
    Cold,
    FirstToken,
    Load,
    LongPrompts,
    Machine,
    Results,
    Row,
    Settings,
    Start,
)
from benchmarks.targets import Target, evaluate
from server.model.weights import BaseModel


def figures(speed: float) -> Figures:
    return Figures(speed, 0.1, 0.2, 0.01, 0.05)


def row(streams: int, kind: str, ours: list[float], peer: list[float]) -> Row:
    return Row(Load(streams, kind), tuple(map(figures, ours)), tuple(map(figures, peer)), 0, None)


def results(rows: list[Row], *, quick: bool = False) -> Results:
    machine = Machine("A CPU", 2, 2, 8 << 30, "3.11", {"torch": "2"})
    return Results(machine, Settings("tiny", "bf16", "cpu", 3, 120, 64, quick), rows)


def find(targets: list[Target], load: str, wanted: str) -> Target:
    return next(target for target in targets if target.load == load and target.wanted == wanted)


def test_percentiles() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, percent) for percent in (0, 50, 90, 100)] == [1.0, 3.0, 4.6, 5.0]
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # the machine halves its speed in the last round; the medians' ratio would be 20/10
    assert median_ratio([20.0, 30.0, 10.0], [10.0, 10.0, 5.0]) == Spread(2.0, 2.0, 3.0)
    assert median_ratio([20.0], []) is None


def test_runs_are_joined() -> None:
    run = Run(8, 2.0, (0.5,), (0.1, 0.3), ("a",))
    joined = join([run, replace(run, seconds=6.0, texts=("b",))])
    assert joined == Run(16, 8.0, (0.5, 0.5), (0.1, 0.3, 0.1, 0.3), ("a", "b"))
    assert Figures.of(joined).tokens_per_second == 2.0


def test_a_stream_is_read_whatever_its_chunks_are() -> None:
    def event(data: object) -> bytes:
        return f"data: {json.dumps(data)}\n\n".encode()

    usage = {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 1}
    last = {"index": 0, "finish_reason": "length", "usage": usage, "timing": {"queue_ms": 250.0}}
    first = event({"index": 0, "text": "a"})
    whole = first + event({"index": 0, "text": "b\n\n"}) + event(last) + b"data: [DONE]\n\n"
    cut = len(first) + 5  # amid the second event
    chunks = [(11.0, whole[:cut]), (14.0, whole[cut:])]
    exchange = Exchange(Request("p", None, 3), sent=10.0, ended=14.0, chunks=chunks)
    answer = Answer.of(exchange)
    assert answer.text == "ab\n\n"
    assert answer.arrivals == (11.0, 14.0)
    assert (answer.num_tokens, answer.num_prompt_tokens, answer.num_cached_tokens) == (3, 7, 1)
    assert answer.queue_seconds == 0.25
    assert summarize([answer]) == Run(3, 4.0, (1.0,), (3.0,), ("ab\n\n",))


def test_a_failed_stream_is_an_error() -> None:
    exchange = Exchange(Request("p", None, 3), chunks=[(0.0, b'event: error\ndata: {"title":"overloaded"}\n\n')])
    with pytest.raises(RuntimeError, match="overloaded"):
        Answer.of(exchange)


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
    assert judge("Once up\ufffd", reference, 0.3) == "exact"  # as far as it can be told
    assert judge("Ones\ufffd", reference, 0.3) == "wrong"


def test_targets_are_judged_by_the_figures() -> None:
    rows = [
        row(1, BASE, [20.0, 20.0], [10.0, 12.0]),
        row(32, BASE, [100.0, 110.0], [60.0, 60.0]),
        row(32, DISTINCT, [90.0, 90.0], [10.0, 10.0]),
        row(32, BLENDS, [40.0, 40.0], []),
    ]
    found = results(rows)
    found.cold = Cold((0.05,), (0.04,), (0.3,), (0.2,))
    found.first_token = FirstToken((0.1,), (0.05,))
    found.long_prompts = LongPrompts(4, 1024, 1.0, (0.01,), (0.02,), (0.02,), (0.07,))
    found.start = Start((6.0, 7.0, 8.0), (5.0, 5.0, 5.0))
    targets = evaluate(found)
    reached = [(target.load, target.reached) for target in targets]
    assert reached == [
        ("1 stream, base", True),
        ("1 stream, 1 adapter", None),
        ("32 streams, base", False),
        ("32 streams, 1 adapter", None),
        ("32 streams, 32 adapters", True),
        ("32 streams, 32 adapters", True),
        ("32 streams, 32 blends of two", False),
        ("1,000 registered, Zipf, pool of 64", None),
        ("its answers", None),
        ("a cold adapter", True),
        ("1 stream, time to first token", False),
        ("ITL p99 while prompts of 1,024 tokens arrive", True),
        ("start to ready, converted base", True),
    ]
    assert find(targets, "32 streams, base", "≥ 2 × PEFT").measured == "1.75 × PEFT (1.67–1.83)"
    cold = find(targets, "a cold adapter", "≥ 5 × faster than load_adapter")
    assert cold.measured == "6.0 × (50 against 300 ms)"


def test_a_quick_run_reaches_nothing() -> None:
    targets = evaluate(results([row(1, BASE, [20.0], [1.0])], quick=True))
    assert {target.reached for target in targets} == {None}
    assert targets[0].measured == "20.00 × PEFT"


def test_the_tables() -> None:
    found = results([row(8, BASE, [80.0], [40.0]), row(8, BLENDS, [60.0], [])])
    text = report.markdown(found, evaluate(found))
    assert "A CPU, 2 cores, 8 GiB; 2 threads" in text
    assert "| 8 streams, base | 80.0 | 40.0 | 2.00 × | – | 100 / 200 | 10.0 / 50.0 | 100, 10.0 |" in text
    assert "| 8 streams, 8 blends of two | 60.0 | – | – | 0.75 | 100 / 200 | 10.0 / 50.0 | – |" in text
    assert "| 8 |" not in text
    assert report.table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


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
    files = [
        ((path / "adapter_config.json").read_bytes(), path / "adapter_model.safetensors") for path in (one, other)
    ]
    weights = [read(config, tensors, tiny_base.config.shape).weights for config, tensors in files]
    assert weights[0].num_parameters == sizes.num_parameters
    assert weights[0].digest != weights[1].digest
    assert {module.rank for module in weights[0].modules.values()} == {RANK}
    assert all(module.b.abs().sum() > 0 for module in weights[0].modules.values())


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    full = parse([])
    assert [load.key for load in full.loads][:4] == ["1-base", "1-one", "1-blends", "8-base"]
    assert full.num_adapters == 32
    some = parse(["--only", "32-base,cold"])
    assert [load.key for load in some.loads] == ["32-base"]
    assert (some.wants("cold"), some.wants("many"), some.num_adapters) == (True, False, 2)
    with pytest.raises(SystemExit):
        parse(["--only", "33-base"])
    assert "33-base" in capsys.readouterr().err


def test_a_reduced_run(tmp_path: Path, tiny_base_dir: Path) -> None:
    out = tmp_path / "out"
    parts = "1-base,2-base,2-distinct,2-blends,cold,long,many"
    places = ["--model", str(tiny_base_dir), "--home", str(tmp_path / "home"), "--out", str(out)]
    found = serve.main(["--quick", "--only", parts, "--dtype", "fp32", "--threads", "1", *places])
    assert [row.load.key for row in found.rows] == parts.split(",")[:4]
    assert all(row.cached_tokens == 0 for row in found.rows)
    # one share of answers each, where PEFT can: fp32 makes them the same
    assert [row.same_start for row in found.rows] == [1.0, 1.0, 1.0, None]
    assert found.many is not None
    assert found.many.verdicts == {"exact": 12, "tie": 0, "wrong": 0}
    assert found.many.control["wrong"] > 0
    assert found.many.num_distinct <= found.many.loads <= found.many.evictions + found.many.most_resident
    assert found.cold is not None
    assert min(found.cold.load_adapter) > 0
    assert found.long_prompts is not None
    assert found.long_prompts.itl_p99[0] >= found.long_prompts.itl_p50[0] > 0
    document = json.loads((out / "serve.json").read_text())
    assert [row["load"]["kind"] for row in document["rows"]] == ["base", "base", "distinct", "blends"]
    assert document["server_peak_rss"] > 0
    assert (out / "serve.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "serve.md").read_text().count("| ---") > 0
    assert sorted(path.name for path in out.iterdir()) == ["serve.json", "serve.md", "serve.png", "server.log"]
