"""Adapters whose products overflow: their requests are invalid, and no operator is alerted."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.end_to_end.server_process import ServerProcess

pytestmark = pytest.mark.real

PROMPT = "The weather is"
MESSAGES = [{"role": "user", "content": PROMPT}]
REASON = "the model's numbers overflowed under these adapters; use smaller adapters or weights"
CALLS = [
    ("/generate", {"prompt": PROMPT, "adapter": "huge"}, ("adapter", REASON)),
    ("/generate", {"prompt": PROMPT, "adapter": "huge", "stream": True}, ("adapter", REASON)),
    ("/generate", {"prompt": PROMPT, "adapters": [{"name": "huge", "weight": 0.5}]}, ("adapter", REASON)),
    (
        "/compare",
        {"prompt": PROMPT, "adapters": ["base", "huge"], "score": [" fine"]},
        ("adapters", f"item 1: {REASON}"),
    ),
    ("/v1/completions", {"model": "huge", "prompt": PROMPT}, ("model", REASON)),
    ("/v1/chat/completions", {"model": "left*0.5+huge", "messages": MESSAGES}, ("model", REASON)),
    ("/v1/chat/completions", {"model": "huge", "messages": MESSAGES, "stream": True}, ("model", REASON)),
]


@pytest.fixture
def huge(server: ServerProcess, tmp_path: Path) -> Iterator[None]:
    """Publish an adapter `huge` of finite numbers whose products overflow."""
    prefix = "base_model.model.model.layers.3.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.full((1, 576), 3e38),
        f"{prefix}.lora_B.weight": torch.full((576, 1), 3e38),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q_proj"],
        "layers_to_transform": [3],
    }
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    server.upload("huge", tmp_path)
    yield
    assert server.client.delete("/adapters/huge").status_code == 204


@pytest.mark.usefixtures("huge", "left")
def test_overflowing_adapter_is_a_client_error(server: ServerProcess) -> None:
    log, before = server.log(), server.counts()
    for path, body, (field, reason) in CALLS:
        response = server.client.post(path, json=body)
        document = response.json()
        if path.startswith("/v1/"):
            assert response.status_code == 400
            error = document["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", field)
            assert error["message"] == f"{field}: {reason}"
        else:
            assert response.status_code == 422
            assert document["errors"] == [{"loc": [field], "message": reason}]
    after = server.counts()

    def growth(outcome: str) -> float:
        name = f'smolora_requests_total{{outcome="{outcome}"}}'
        return after[name] - before[name]

    assert growth("failed") == 0
    assert growth("invalid") >= len(CALLS)
    errors = [name for name in after if name.startswith("smolora_http_requests_total") and 'status="5' in name]
    assert all(after[name] == before.get(name, 0.0) for name in errors)
    assert " ERROR " not in server.log().removeprefix(log)
