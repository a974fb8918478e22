"""A whole cluster on the real base answers like a single process."""

from itertools import cycle
from pathlib import Path

import pytest

from tests.cluster.conftest import needs_ray
from tests.cluster.kit import CACHES, publish
from tests.cluster.test_answers import BODIES, QUESTIONS, answer, compared
from tests.cluster.whole import Whole
from tests.end_to_end.server_process import ServerProcess
from tests.end_to_end.training_client import code_rows, submit, succeeded
from tests.kits.postgres import CLUSTER

pytestmark = [*CLUSTER, needs_ray, pytest.mark.real, pytest.mark.slow]
FLAGS = {"device": "cpu", "max_model_len": 512, "max_num_seqs": 8, **CACHES, "adapter_cache_bytes": "64MiB"}
TRAINING = {"max_steps": 3, "batch_size": 2, "max_length": 32}


def test_the_real_base(tmp_path: Path, base_dir: Path) -> None:
    """Adapters are published, trained and used through each API process in turn; answers equal the single
    process's bit for bit."""
    single = ServerProcess(tmp_path / "single", model=base_dir, **{**FLAGS, "workers": 1})
    whole = None
    try:
        whole = Whole(tmp_path / "whole", base_dir, **FLAGS)
        for seed, name in enumerate(("left", "right", "third")):
            assert whole.publish(seed % 2, name, seed).status_code == 201
            publish(single, name, seed, whole.shape)
        trained = {"name": "codes", "data": code_rows(8), "training": TRAINING}
        succeeded(single, submit(single, **trained))
        with whole.client(0) as first, whole.client(1) as second:
            job = first.post("/train", json=trained).json()["id"]
            whole.wait_for_job(1, job)
            bodies = {**BODIES, "trained": {"temperature": 0, "adapter": "codes@1"}}
            for client, (kind, fields) in zip(cycle((second, first)), bodies.items(), strict=False):
                body = {"prompt": f"{kind}: 404 Not Found means", "max_tokens": 24, **fields}
                assert compared(client.post("/generate", json=body)) == answer(single, body), kind
            assert single.client.get("/ready").json()["backends"] == ["native"]
            several = {"adapter": "left*0.5+codes", "input": ["502 Bad", "200 OK"], "questions": QUESTIONS}
            expected = single.client.post("/decide", json=several)
            for client in (first, second):
                found = client.post("/decide", json=several)
                assert found.status_code == expected.status_code == 200, found.text
                assert found.json()["results"] == expected.json()["results"]
    finally:
        single.close()
        if whole is not None:
            whole.close()
