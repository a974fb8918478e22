"""The hardest targets of serving, reached or not."""

import math
from dataclasses import replace

import pytest

from benchmarks.serving import report
from benchmarks.serving.overload import Overload
from benchmarks.serving.results import Cold, LongPrompts, Results, Start, Ways
from benchmarks.serving.systems.systems import BASE, BLENDS, DISTINCT, ONE, OURS, WIDE
from benchmarks.serving.targets import evaluate
from benchmarks.targets import Target
from tests.benchmarks.kit import LLAMA_CPP, figures, results, row


@pytest.fixture
def found() -> Results:
    made = results(
        [
            row(1, BASE, ours=[170.0, 160.0], llama=[100.0, 100.0], openvino=[110.0, 110.0]),
            row(1, ONE, ours=[160.0, 160.0], llama=[80.0, 80.0]),
            row(32, BASE, ours=[780.0, 720.0], llama=[300.0, 300.0], openvino=[600.0, 600.0]),
            row(32, DISTINCT, ours=[720.0, 720.0], llama=[75.0, 75.0]),
            row(32, BLENDS, ours=[600.0, 600.0], llama=[50.0, 50.0]),
        ]
    )
    made.first_token = {OURS: (0.05, 0.06), LLAMA_CPP: (0.1, 0.1)}
    made.bandwidth = (27e9, 27e9)  # 10 ms for the weights
    made.ways = [Ways(1, (100.0,), (96.0,), (96.0,)), Ways(32, (700.0,), (560.0,), (690.0,))]
    made.cold = Cold((0.02,), (0.05,), (0.01,), (0.004,), (0.03,), (0.9,))
    made.long_prompts = LongPrompts(4, 1000, 1.0, (0.01,), (0.012,), (0.012,), (0.019,), (0.5,))
    made.overload = Overload(32, 60.0, (700.0,), (630.0,), (50.0,), (0.7,), (9.0,))
    made.start = Start((2.9, 3.5, 2.5), (2.0, 2.0, 2.0))
    return made


def find(targets: list[Target], load: str, wanted: str) -> Target:
    return next(target for target in targets if target.load == load and target.wanted == wanted)


def test_targets_follow_from_the_figures(found: Results) -> None:
    targets = evaluate(found)
    assert [(target.load, target.wanted, target.reached) for target in targets] == [
        ("1 stream, base", "≥ 1.6 × llama.cpp", True),
        ("32 streams, base", "≥ 1.3 × OpenVINO GenAI", False),
        ("32 streams, base", "≥ 2.4 × llama.cpp", True),
        ("32 streams, 32 adapters", "≥ 10 × llama.cpp", False),
        ("1 stream, base, weights as stored", "≥ 1.6 × llama.cpp at its best width", True),
        ("1 stream, base: between tokens", "≥ 0.95 of the memory bound", True),
        ("1 stream, 1 adapter", "≥ 0.95 of own base", True),
        ("1 stream, blend of two", "≥ 0.92 of own base", None),
        ("32 streams, 32 adapters", "≥ 0.88 of own base", True),
        ("32 streams, 32 blends of two", "≥ 0.82 of own base", False),
        ("5 × capacity, open loop, a minute: goodput", "≥ 0.95 of the peak", False),
        ("1,000 registered, Zipf, pool of 64", "≥ 0.85 of own base", None),
        ("sampled (temperature 0.7, top_p 0.9), 1 stream", "≥ 0.95 of greedy", True),
        ("sampled (temperature 0.7, top_p 0.9), 32 streams", "≥ 0.95 of greedy", False),
        ("logprobs 5, 1 stream", "≥ 0.97 of greedy", False),
        ("logprobs 5, 32 streams", "≥ 0.97 of greedy", True),
        ("1 stream, time to first token", "≤ 0.5 of llama.cpp's", False),
        ("ITL p99 while a long prompt arrives each second", "≤ 2 × quiet p50", True),
        ("the long prompts' first token", "≤ 0.52 s", True),
        ("a cold adapter, just uploaded", "≤ 2 × reading its bytes from the page cache", False),
        ("start to ready, converted base", "< 3 s in all", True),
    ]
    assert find(targets, "32 streams, base", "≥ 2.4 × llama.cpp").measured == "2.50 (2.40–2.60)"
    cold = find(targets, "a cold adapter, just uploaded", "≤ 2 × reading its bytes from the page cache")
    assert cold.measured == "5.00 ×: 20.0 against 4.0 ms"
    assert find(targets, "start to ready, converted base", "< 3 s in all").measured == "2.9 (2.5–3.5) s"


def test_fastest_width_of_the_peer_counts(found: Results) -> None:
    quantized = found.systems[1].__class__("llama.cpp, Q4_1", "1", True, "", {}, base_only=True)
    found.systems.append(quantized)
    found.rows[0].figures["llama.cpp, Q4_1"] = (figures(120.0), figures(120.0))
    target = find(evaluate(found), "1 stream, base, weights as stored", "≥ 1.6 × llama.cpp at its best width")
    assert (target.measured, target.reached) == ("1.38 (1.33–1.42)", False)


def test_16_bit_targets_use_the_16_bit_server(found: Results) -> None:
    found.settings = replace(found.settings, weight_bytes=96_000_000)
    wanted = (
        ("1 stream, base, 16-bit weights", "≥ 1.6 × llama.cpp"),
        (
            "1 stream, base, 16-bit weights: between tokens",
            "≥ 0.95 of the memory bound",
        ),
    )
    assert [find(evaluate(found), *one).reached for one in wanted] == [None, None], "ours keeps fewer bits"
    found.systems.append(replace(found.systems[0], name=WIDE, max_streams=1))
    found.rows[0].figures[WIDE] = (figures(150.0, itl=0.0125), figures(150.0, itl=0.0125))
    assert [find(evaluate(found), *one).measured for one in wanted] == [
        "1.50",
        "0.80",
    ]
    assert find(evaluate(found), "1 stream, base: between tokens", wanted[1][1]).measured == "0.36"


def test_quick_runs_reach_no_target(found: Results) -> None:
    quick = results(found.rows, quick=True)
    assert {target.reached for target in evaluate(quick)} == {None}
    assert evaluate(quick)[0].measured == "1.65 (1.60–1.70)"


def test_tables(found: Results) -> None:
    found.systems.append(found.systems[1].__class__("llama.cpp, Q8_0", "1", True, "", {}, base_only=True))
    text = report.markdown(found)
    assert "`python -m benchmarks.x`, 2026-01-01. A CPU, 2 threads; commit abc." in text
    assert "median (lowest–highest) of 3 rounds, all systems in turn" in text
    assert "|load|smolora|llama.cpp|OpenVINO GenAI|llama.cpp, Q8_0|" in text
    assert "|1 stream, base|165 (160–170)|100|110|–|" in text
    # Unsupported, or not asked.
    assert "|32 streams, 32 adapters|720|75.0|can't|–|" in text
    assert "|32 streams, 32 blends of two|100|10.0|50.0|" in text
    details = report.details(found)
    assert "2 cores, 8 GiB, Python 3.11, torch 2, c++ 12." in details
    assert "ik was left out: no package" in details
    assert "20.0 if just uploaded (reading its file" in details
    assert "Answers that begin as ours do (rounding moves near ties): llama.cpp 75%." in details


def test_missing_figures_are_dashes(found: Results) -> None:
    found.rows[1].figures[OURS] = (figures(80.0, itl=math.nan),)
    assert "|1 stream, 1 adapter|100|–|50.0|" in report.markdown(found)
