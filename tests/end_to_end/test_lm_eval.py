"""lm-eval, unchanged, gets the same log-likelihoods from the server as from its Hugging Face backend."""

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.end_to_end.server_process import PATIENCE, ServerProcess, environment

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: make client-tests"),
]

QUESTIONS = [
    {"question": "The capital of France is", "choices": [" Paris", " Paris, Texas", " Rome"], "answer": 0},
    {"question": "The opposite of hot is", "choices": [" cold", " warm water", " 日本"], "answer": 0},
    {"question": "Two and two make", "choices": [" five", " four", " a large number of things"], "answer": 1},
    {"question": "def add(a, b):\n    return", "choices": [" a + b", " None", " a\n"], "answer": 0},
]
STORIES = [
    {"text": "Once upon a time, there was a small server that answered every question."},
    {"text": "Grüße aus Köln: für 5 € gibt es 🦜."},
    {"text": "x<|im_end|>y"},
    {"text": "One."},
]
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/choices.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
ROLLING = """
task: own_stories
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/stories.json}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
Likelihoods = Mapping[str, list[list[float]]]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two tasks, and return their directory."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows, task in (("choices", QUESTIONS, CHOICES), ("stories", STORIES, ROLLING)):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))
    return folder


def likelihoods(
    tasks: Path, output: Path, model: str, arguments: Mapping[str, object], *options: str
) -> Likelihoods:
    """Run lm-eval's command, and return each task's log-likelihoods, a list for each row."""
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--tasks", "own_choices,own_stories"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(tasks), "--output_path", str(output), "--log_samples", *options]
    caches = {"HF_HOME": str(tasks / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment() | caches, capture_output=True, text=True, timeout=5 * PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[list[float]]] = {}
    for file in output.rglob("samples_*.jsonl"):
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: int(row["doc_id"]))
        task = "own_choices" if "own_choices" in file.name else "own_stories"
        # a choice's answer is also whether it is greedy; a rolling answer is the log-likelihood alone
        answers = [[answer for (answer,) in row["resps"]] for row in rows]
        found[task] = [[float(one[0] if isinstance(one, list) else one) for one in row] for row in answers]
    return found


@pytest.mark.parametrize(
    ("adapter", "arguments", "batch_size"),
    [
        ("base", {}, 1),  # the harness finds the server's own tokenizer
        ("right", {"tokenizer_backend": "huggingface", "num_concurrent": 2}, 4),
    ],
)
def test_likelihoods_equal_those_of_the_hugging_face_backend(
    exact_server: ServerProcess,
    hf_base_dir: Path,
    right: Path,
    tasks: Path,
    tmp_path: Path,
    adapter: str,
    arguments: Mapping[str, object],
    batch_size: int,
) -> None:
    tokenizer = {} if arguments.get("tokenizer_backend") is None else {"tokenizer": hf_base_dir}
    served = likelihoods(
        *(tasks, tmp_path / "served", "local-completions"),
        {"model": adapter, "base_url": f"{exact_server.url}/v1/completions", "max_length": 256}
        | tokenizer
        | dict(arguments),
        *("--batch_size", str(batch_size)),
    )
    own = {"pretrained": hf_base_dir, "dtype": "float32", "max_length": 255}
    own |= {} if adapter == "base" else {"peft": right}
    expected = likelihoods(tasks, tmp_path / "hugging-face", "hf", own, "--device", "cpu")
    for task, num_rows, num_values in (("own_choices", len(QUESTIONS), 3), ("own_stories", len(STORIES), 1)):
        assert [len(row) for row in expected[task]] == [num_values] * num_rows
        for row, expected_row in zip(served[task], expected[task], strict=True):
            assert row == pytest.approx(expected_row, abs=1e-3)
