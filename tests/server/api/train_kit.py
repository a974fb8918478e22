"""Bodies of POST /train, and a stand-in for a worker."""

from http import HTTPStatus
from typing import Any

import httpx

from adapters.catalog.catalog import NewVersion, Version
from server.jobs.leases import Claim, Leases

ROWS: list[dict[str, object]] = [
    {"prompt": f"{status.value} ", "completion": status.phrase} for status in list(HTTPStatus)[:20]
]
CONFIG: dict[str, Any] = {
    "name": "codes",
    "method": "lora",
    "lora": {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "init": "gaussian",
        "use_rslora": False,
        "init_std": 0.0625,
    },
    "training": {
        "epochs": 20,
        "max_steps": None,
        "learning_rate": 1e-3,
        "batch_size": 8,
        "max_length": 512,
        "schedule": "cosine",
        "warmup_ratio": 0.05,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 0,
        "eval_steps": None,
        "checkpoint_steps": None,
        "early_stopping_patience": None,
        "packing": True,
        "overlong": "auto",
        "auto_epochs": True,
    },
    "start_from": None,
    "start_from_digest": None,
    "publish_if": "always",
    "publish_metric": "loss",
    "alias": None,
    "description": "",
}
"""What API.md says that a body of name and data alone means."""


def train_body(**fields: object) -> dict[str, object]:
    """Twenty rows for an adapter called "codes", and what else is asked for; None leaves a field out."""
    body = {"name": "codes", "data": ROWS, **fields}
    return {name: value for name, value in body.items() if value is not None}


async def submit(client: httpx.AsyncClient, **fields: object) -> str:
    """Queue a job; its id."""
    response = await client.post("/train", json=train_body(**fields))
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


class StandIn:
    """Takes the next job, unless it was given one, and does and says what a worker would."""

    def __init__(self, leases: Leases, claim: Claim | None = None) -> None:
        self._leases = leases
        claim = claim or leases.claim("stand-in")
        assert claim is not None, "no job waits"
        self.claim: Claim = claim

    def step(self, step: int, loss: float = 1.5) -> None:
        data = {"step": step, "train_loss": loss}
        self._leases.add_metrics(self.claim, f"step {step}: loss {loss:.4f}", data)
        self._leases.flush(self.claim)
        progress = {"step": step, "total_steps": 9, "epoch": 0.5, "tokens": 100 * step}
        progress |= {"tokens_per_second": 250.0, "eta_seconds": 2.0}
        self._leases.heartbeat(self.claim, progress=progress, metrics={"train_loss": loss})

    def succeed(
        self,
        report: dict[str, object] | None = None,
        digest: str | None = None,
        eval_loss: float = 0.75,
        step: int = 9,
        worse: str | None = None,
    ) -> Version | None:
        new = None
        if digest is not None:
            new = NewVersion(
                name="codes", digest=digest, rank=2, alpha=4.0, target_modules=("q_proj",), parameters=1, bytes=1
            )
        return self._leases.succeed(
            self.claim,
            progress={"step": step, "total_steps": 9, "tokens_per_second": 250.0, "eta_seconds": 0.0},
            metrics={"train_loss": 0.5, "eval_loss": eval_loss, "base_eval_loss": 3.0, "eval_accuracy": 0.9},
            report=report or {"name": "codes"},
            publish=new,
            worse=worse,
        )

    def fail(self, error: str) -> None:
        self._leases.fail(self.claim, error)
