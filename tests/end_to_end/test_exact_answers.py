"""Answers and log-probabilities over HTTP in fp32, compared with transformers and PEFT."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.end_to_end.peft_reference import Reference
from tests.end_to_end.server_process import ServerProcess
from tests.kits.oracles.hugging_face import decoded

pytestmark = pytest.mark.real

PROMPT = "Once upon a time, in a village by the sea,"


def test_messages_go_through_the_chat_template(exact_server: ServerProcess, reference: Reference) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = reference.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (expected,) = reference.greedy([str(prompt)], 12)
    body = {"messages": messages, "temperature": 0, "max_tokens": 12}
    answer = exact_server.client.post("/generate", json=body).json()
    assert answer["choices"][0]["text"] == expected.text
    ended = expected.token_ids[-1] == reference.tokenizer.eos_token_id
    assert answer["choices"][0]["finish_reason"] == ("stop" if ended else "length")
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)


@pytest.mark.parametrize("adapter", ["base", "right"])
def test_logprobs_equal_the_references(
    exact_server: ServerProcess, reference: Reference, right: Path, adapter: str
) -> None:
    choice = exact_server.generate(PROMPT, adapter=adapter, max_tokens=8, logprobs=5)["choices"][0]
    if adapter == "base":
        (expected,) = reference.greedy([PROMPT], 8)
    else:
        with reference.adapter(right):
            (expected,) = reference.greedy([PROMPT], 8)
    assert choice["text"] == expected.text
    assert len(choice["logprobs"]) == 8
    logprobs = expected.logits.double().log_softmax(-1)  # (tokens, vocab)
    for entry, token_id, row in zip(choice["logprobs"], expected.token_ids, logprobs, strict=True):
        assert entry["token"] == reference.tokenizer.decode([token_id])
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == pytest.approx(float(row[token_id]), abs=1e-3)
        values, token_ids = row.topk(5)
        assert [top["logprob"] for top in entry["top"]] == pytest.approx(values.tolist(), abs=1e-3)
        assert entry["top"][0]["token"] == reference.tokenizer.decode([int(token_ids[0])])


def test_logprobs_of_sampled_tokens_equal_the_references(
    exact_server: ServerProcess, reference: Reference
) -> None:
    """Log-probabilities are those before temperature, top-k and penalties."""
    body = {"temperature": 1.5, "top_k": 50, "repetition_penalty": 1.3, "seed": 7, "max_tokens": 1, "logprobs": 20}
    (expected,) = reference.greedy([PROMPT], 1)
    logprobs = expected.logits[0].double().log_softmax(-1)  # (vocab,)
    top, token_ids = logprobs.topk(20)
    (entry,) = exact_server.generate(PROMPT, **body)["choices"][0]["logprobs"]
    assert [item["logprob"] for item in entry["top"]] == pytest.approx(top.tolist(), abs=1e-3)
    chosen = reference.tokenizer.encode(entry["token"])
    assert len(chosen) == 1
    assert entry["logprob"] == pytest.approx(float(logprobs[chosen[0]]), abs=1e-3)
    assert chosen[0] in logprobs.topk(50).indices.tolist()
    assert chosen[0] != int(token_ids[0])  # the seed was chosen so that the sample isn't greedy


@pytest.mark.parametrize("adapter", ["base", "right"])
def test_prompt_scores_equal_the_references(
    exact_server: ServerProcess, reference: Reference, right: Path, adapter: str
) -> None:
    """In both forms, with the likeliest tokens."""
    with reference.adapter(right) if adapter == "right" else nullcontext():
        first, *others = reference.tokenizer.encode(PROMPT)
        # one more token, so that the last row is the distribution after the prompt
        rows = reference.logprobs(decoded(reference.tokenizer, [first]), [*others, 0])
    ids = [first, *others]
    expected = [float(row[token_id]) for row, token_id in zip(rows, ids[1:], strict=False)]
    best = [row.topk(3) for row in rows[:-1]]
    body = {"model": adapter, "prompt": ids, "echo": True, "logprobs": 3, "max_tokens": 1, "temperature": 0}
    (choice,) = exact_server.client.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-3)
    assert found["token_logprobs"][-1] == pytest.approx(float(rows[-1].max()), abs=1e-3)
    assert choice["text"].startswith(PROMPT)
    for top, expected_top in zip(found["top_logprobs"][1:-1], best, strict=True):
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(expected_top.values.tolist(), abs=1e-3)
    answer = exact_server.generate(PROMPT, adapter=adapter, max_tokens=0, prompt_logprobs=3)
    scores = answer["prompt_logprobs"]
    assert scores[0] is None
    assert [entry["logprob"] for entry in scores[1:]] == pytest.approx(expected, abs=1e-3)
    for entry, expected_top in zip(scores[1:], best, strict=True):
        assert [top["logprob"] for top in entry["top"]] == pytest.approx(expected_top.values.tolist(), abs=1e-3)
