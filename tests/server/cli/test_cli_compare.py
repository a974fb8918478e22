"""`smolora compare` against a real server on a tiny base."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner, Result

from server.cli.main import app
from tests.kits.oracles.hugging_face import load_reference, logits
from tests.server.api.adapters.peft_files import as_parts, peft_files
from tests.server.running import Running, running

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base_dir: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("home"), tiny_base_dir) as server:
        files = as_parts(*peft_files(shape=server.services.library.shape))
        assert httpx.post(f"{server.url}/adapters/up", files=files, trust_env=False).status_code == 201
        yield server


@pytest.fixture
def smolora(server: Running) -> Run:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, arguments, env={"SMOLORA_URL": server.url, "COLUMNS": "120"})

    return run


def test_json_is_the_servers_answer(smolora: Run, tiny_base_dir: Path, server: Running) -> None:
    """The log-probabilities equal Hugging Face's."""
    arguments = ("compare", "Not", "-a", "base", "-a", "up*0.5", "-s", " Found", "--max-tokens", "3", "--json")
    result = smolora(*arguments, "--temperature", "0")
    assert result.exit_code == 0, result.output
    base, up = json.loads(result.stdout)["results"]
    assert [part["name"] for part in up["adapters"]] == ["up"]
    encoder = server.services.encoder
    prompt, more = list(encoder.prompt("Not")), list(encoder.continuation(" Found"))
    model = load_reference(tiny_base_dir)
    rows = logits(model, prompt + more).log_softmax(-1)[len(prompt) - 1 :]
    expected = sum(float(row[token_id]) for row, token_id in zip(rows, more, strict=False))
    assert base["scores"][0] == {
        "text": " Found",
        "logprob": pytest.approx(expected, abs=1e-3),
        "num_tokens": len(more),
        "logprobs": None,
    }
    total, token_ids = 0.0, prompt
    for _ in range(base["usage"]["completion_tokens"]):
        last = logits(model, token_ids)[-1].log_softmax(-1)
        total += float(last.max())
        token_ids = [*token_ids, int(torch.argmax(last))]
    assert base["logprob"] == pytest.approx(total, abs=1e-3)


def test_answers_are_side_by_side(smolora: Run) -> None:
    scored = ("-s", " Found", "-s", "!")
    greedy = ("--max-tokens", "3", "--temperature", "0")  # a sampled answer may have line breaks
    result = smolora("compare", "Not", "-a", "base", "-a", "up", *scored, *greedy)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].split() == ["adapter", "log-probability", "answer"]
    assert "over 3 tokens" in lines[1]
    assert [line.split()[0] for line in lines[1:3]] == ["base", "up"]
    assert lines[-3].split() == ["text", "base", "up"]
    assert [float(value) < 0 for value in lines[-1].split()[1:]] == [True, True]


def test_refusal_ends_the_command(smolora: Run) -> None:
    result = smolora("compare", "Not", "-a", "base", "-a", "nobody")
    assert result.exit_code == 1
    assert "nobody" in result.output
    assert smolora("compare", "Not").exit_code == 2  # at least one adapter


def test_a_list_of_adapters_is_refused(smolora: Run) -> None:
    result = smolora("compare", "Not", "-a", "base, up")
    assert result.exit_code == 2
    advice = " ".join(result.stderr.replace("│", " ").split())
    assert "give the option once for each adapter, as in -a base -a up; a blend joins its parts with +" in advice
