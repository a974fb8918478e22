"""An adapter trained by PEFT on real data gets the same answers from the server as from PEFT."""

from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.end_to_end.conftest import ALL_LINEAR
from tests.end_to_end.peft_reference import Reference
from tests.end_to_end.server_process import ServerProcess

pytestmark = pytest.mark.real

STATUSES = [HTTPStatus(code) for code in (100, 202, 304, 403, 404, 409, 429, 503)]
HELD_OUT = [HTTPStatus(code) for code in (200, 405, 502)]
IGNORED = -100  # a label that the loss ignores
MAX_TOKENS = 6


def prompt(status: HTTPStatus) -> str:
    return f"HTTP {status.value}:"


def batch(reference: Reference, statuses: Sequence[HTTPStatus]) -> dict[str, torch.Tensor]:
    """Return one row per status, (rows, longest row): prompt, then phrase and end token as labels."""
    tokenizer = reference.tokenizer
    prompts = [tokenizer.encode(prompt(status)) for status in statuses]
    answers = [[*tokenizer.encode(f" {status.phrase}"), tokenizer.eos_token_id] for status in statuses]
    width = max(len(a) + len(b) for a, b in zip(prompts, answers, strict=True))
    rows = torch.full((3, len(statuses), width), 0)
    rows[2] = IGNORED
    for i, (start, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(start) + len(answer)
        rows[0, i, :end] = torch.tensor([*start, *answer])
        rows[1, i, :end] = 1
        rows[2, i, len(start) : end] = torch.tensor(answer)
    return dict(zip(("input_ids", "attention_mask", "labels"), rows, strict=True))


@pytest.fixture
def phrases(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train rank 8 on the last six layers (so that backward is short) until the phrases are memorized."""
    directory = tmp_path_factory.mktemp("phrases")
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=ALL_LINEAR,
        layers_to_transform=list(range(24, 30)),
        task_type="CAUSAL_LM",
    )
    rows = batch(reference, STATUSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with reference.new_adapter(config) as tuned:
            trainable = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=1e-2)
            for _ in range(10):
                loss = tuned(**rows).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            reference.save(tuned, directory)
    return directory


@pytest.mark.thorough  # test_adapter_life.py has random adapters
def test_answers_change_like_pefts(exact_server: ServerProcess, reference: Reference, phrases: Path) -> None:
    prompts = [prompt(status) for status in (*STATUSES, *HELD_OUT)]
    before = reference.texts(prompts, MAX_TOKENS)
    assert exact_server.texts(prompts, max_tokens=MAX_TOKENS) == before

    exact_server.upload("phrases", phrases)
    with reference.adapter(phrases):
        after = reference.texts(prompts, MAX_TOKENS)
    learnt = [answer == f" {status.phrase}" for answer, status in zip(after, STATUSES, strict=False)]
    assert sum(learnt) >= len(STATUSES) - 2
    assert not set(after) & set(before)
    assert exact_server.texts(prompts, adapter="phrases", max_tokens=MAX_TOKENS) == after
    assert exact_server.texts(prompts[:4], max_tokens=MAX_TOKENS) == before[:4]
    (choice,) = exact_server.generate(prompts[0], adapter="phrases", max_tokens=MAX_TOKENS)["choices"]
    assert choice["finish_reason"] == "stop"  # it has learnt to end, too
