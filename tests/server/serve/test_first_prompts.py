"""The prompts that a ready server suggests."""

import json
import shlex

import pytest

from server.serve.startup import first_prompts
from server.system.messages import program


def test_prompts_with_default_settings() -> None:
    ours, curl = first_prompts("http://127.0.0.1:8000", is_chat=True, needs_key=False)
    assert ours == f"{program()} chat 'What is the capital of France?' --max-tokens 16 --temperature 0"
    *_, body = shlex.split(curl)
    assert json.loads(body)["messages"][0]["content"] == "What is the capital of France?"


def test_prompts_with_another_address_and_keys() -> None:
    ours, curl = first_prompts("http://[::1]:81", is_chat=True, needs_key=True)
    assert ours.startswith("SMOLORA_API_KEY=YOUR_KEY ")
    assert ours.endswith(" --url 'http://[::1]:81'")
    assert "Authorization: Bearer YOUR_KEY" in shlex.split(curl)


@pytest.mark.parametrize("number", [0, 1])
def test_prompts_for_a_base_without_a_chat_template(number: int) -> None:
    line = first_prompts("http://127.0.0.1:8000", is_chat=False, needs_key=False)[number]
    assert "The capital of France is" in line
    assert "messages" not in line
    assert " chat " not in line
