"""PEFT's AutoPeftModelForCausalLM, unchanged, loads a download with its base from the hub's cache."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from server.model.base.source import EMBEDDED, EMBEDDED_HUB_ID
from tests.end_to_end.peft_reference import CONFIG, WEIGHTS
from tests.end_to_end.server_process import ServerProcess, environment
from tests.kits.fake_hub import COMMIT
from tests.server.api.adapters.peft_files import as_parts

pytestmark = pytest.mark.real

PROMPT = "Once upon a time"
ANSWER = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
ids = tokenizer(sys.argv[2], return_tensors="pt")
found = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1]:]
sys.stdout.write(tokenizer.decode(found, skip_special_tokens=True))
"""


def test_a_download_finds_its_base(
    exact_server: ServerProcess, left: Path, hf_base_dir: Path, tmp_path: Path
) -> None:
    config = json.loads((left / CONFIG).read_text()) | {"base_model_name_or_path": EMBEDDED}  # as jobs name it
    weights = (left / WEIGHTS).read_bytes()
    exact_server.client.post("/adapters/portable", files=as_parts(json.dumps(config).encode(), weights))
    content = exact_server.client.get("/adapters/portable/1/download").content
    folder = tmp_path / "portable"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
    cached = tmp_path / "hub" / "hub" / f"models--{EMBEDDED_HUB_ID.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / COMMIT).symlink_to(hf_base_dir, target_is_directory=True)
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ANSWER, str(folder), PROMPT]
    done = subprocess.run(command, env=environment() | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == exact_server.text(PROMPT, adapter="portable", max_tokens=8)
    assert done.stdout != exact_server.text(PROMPT, max_tokens=8)
