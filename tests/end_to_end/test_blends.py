"""Weighted expressions over HTTP, compared with one dense model in transformers: W + Σ wᵢ·(αᵢ/rᵢ)·Bᵢ Aᵢ."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import AdapterFiles
from tests.end_to_end.peft_reference import Reference
from tests.end_to_end.server_process import ServerProcess

pytestmark = pytest.mark.real

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
]


def served(server: ServerProcess, **fields: object) -> list[str]:
    return server.texts(PROMPTS, max_tokens=10, **fields)


def test_a_blend_is_the_dense_sum(
    exact_server: ServerProcess, reference: Reference, left: Path, right: Path
) -> None:
    blended = served(exact_server, adapter="left*0.7+right*-0.3")
    with reference.blend([(left, 0.7), (right, -0.3)]):
        expected = reference.texts(PROMPTS, 10, blended)
    assert blended == expected
    assert served(exact_server, adapter="right*-0.3 + left@1*0.2 + left*0.5") == expected
    parts = [{"name": "right", "weight": -0.3}, {"name": "left", "version": 1, "weight": 0.7}]
    assert served(exact_server, adapters=parts) == expected
    assert expected not in (served(exact_server), served(exact_server, adapter="left"))


def test_zero_weights_are_the_base(
    exact_server: ServerProcess, reference: Reference, left: Path, right: Path
) -> None:
    answer = exact_server.generate(PROMPTS[1], adapter="left*0+right*0", max_tokens=12)
    assert [part["weight"] for part in answer["adapters"]] == [0, 0]
    text = answer["choices"][0]["text"]
    assert [text] == reference.texts(PROMPTS[1:2], 12, [text])
    assert not reference.is_greedy(PROMPTS[1], text + " there", 13)
    assert not reference.is_greedy(PROMPTS[1], text.rpartition(" ")[0], 12)


@pytest.mark.thorough  # two parts are tested above
def test_sixteen_parts(exact_server: ServerProcess, reference: Reference, adapter_files: AdapterFiles) -> None:
    parts = []
    for number in range(16):
        modules = [["q_proj", "v_proj"], ["up_proj"], ["o_proj", "down_proj"]][number % 3]
        directory = adapter_files.make(100 + number, rank=1 + number, alpha=8, modules=modules)
        exact_server.upload(f"part-{number}", directory)
        parts.append((directory, (-1) ** number * 0.25))
    expression = "+".join(f"part-{number}*{weight}" for number, (_, weight) in enumerate(parts))
    blended = served(exact_server, adapter=expression)
    with reference.blend(parts):
        expected = reference.texts(PROMPTS, 10, blended)
    assert blended == expected
    assert expected != served(exact_server)
    answer = exact_server.generate("a", adapter=expression, max_tokens=1)
    assert [(part["name"], part["weight"]) for part in answer["adapters"]] == [
        (f"part-{number}", weight) for number, (_, weight) in enumerate(parts)
    ]
