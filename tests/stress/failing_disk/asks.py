"""Requests that write, each repeatable: a different number makes a different object with the same system calls."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from adapters.lora import BaseShape
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME, write
from tests.end_to_end.training_client import code_rows
from tests.server.jobs.merge_kit import sample


@dataclass(frozen=True)
class Ask:
    """A request; `options` are httpx's."""

    method: str
    path: str
    options: dict[str, Any]


class Asker:
    """A client that makes requests, and the objects that they need."""

    def __init__(self, client: httpx.Client, shape: BaseShape) -> None:
        self._client = client
        self._shape = shape
        for number in (1, 2):
            self.done(self._upload("up", -number))

    def send(self, ask: Ask) -> httpx.Response:
        return self._client.request(ask.method, ask.path, **ask.options)

    def done(self, ask: Ask) -> Any:
        """Make the request and return its response, which must be a success."""
        response = self.send(ask)
        assert response.is_success, response.text
        return response.json() if response.content else None

    def upload(self, number: int) -> Ask:
        return self._upload("up", number)

    def dataset(self, number: int) -> Ask:
        return Ask("POST", "/datasets", {"files": _rows(number)})

    def file(self, number: int) -> Ask:
        return Ask("POST", "/v1/files", {"files": _rows(number), "data": {"purpose": "fine-tune"}})

    def train(self, number: int) -> Ask:
        return Ask("POST", "/train", {"json": {"name": f"job{number}", "data": code_rows(4)}})

    def fine_tuning(self, number: int) -> Ask:
        file_id = self.done(self.file(-number))["id"]
        return Ask("POST", "/v1/fine_tuning/jobs", {"json": {"model": "base", "training_file": file_id}})

    def cancellation(self, number: int) -> Ask:
        return Ask("POST", f"/train/{self.done(self.train(number))['id']}/cancel", {})

    def composition(self, number: int) -> Ask:
        return Ask("POST", "/compositions/mix", {"json": {"expression": f"up@1*{1 + number / 1000}"}})

    def merge(self, number: int) -> Ask:
        body = {"expression": f"up@1*{1 + number / 1000}+up@2", "method": "svd"}
        return Ask("POST", f"/compositions/merged{number}", {"json": body})

    def alias(self, number: int) -> Ask:
        return Ask("PUT", f"/adapters/up/aliases/a{number}", {"json": {"version": 1}})

    def alias_removal(self, number: int) -> Ask:
        self.done(self.alias(number))
        return Ask("DELETE", f"/adapters/up/aliases/a{number}", {})

    def deletion(self, number: int) -> Ask:
        version = self.done(self._upload("gone", 10_000 + number))["version"]
        return Ask("DELETE", f"/adapters/gone/{version}?force=true", {})

    def visibility(self, number: int) -> Ask:
        self.done(self._upload(f"shown{number}", number))
        return Ask("PUT", f"/adapters/shown{number}/visibility", {"json": {"visibility": "public"}})

    def key(self, number: int) -> Ask:
        return Ask("POST", "/keys", {"json": {"name": f"key{number}"}})

    def revocation(self, number: int) -> Ask:
        return Ask("DELETE", f"/keys/{self.done(self.key(number))['id']}", {})

    def project(self, number: int) -> Ask:
        return Ask("PUT", f"/projects/p{number}", {"json": {"max_jobs": 2}})

    def project_removal(self, number: int) -> Ask:
        self.done(self.project(number))
        return Ask("DELETE", f"/projects/p{number}", {})

    def _upload(self, name: str, seed: int) -> Ask:
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory), sample(self._shape, 20_000 + seed, rank=2, names=("q_proj",)))
            names = {"adapter_config": CONFIG_NAME, "adapter_model": WEIGHTS_NAME}
            files = {field: (name, (Path(directory) / name).read_bytes()) for field, name in names.items()}
        return Ask("POST", f"/adapters/{name}", {"files": files})


def _rows(number: int) -> dict[str, tuple[str, bytes]]:
    rows = [{"text": f"number {number}"}, *code_rows(4)]
    return {"file": ("a.jsonl", "\n".join(map(json.dumps, rows)).encode())}


ASKS: dict[str, Callable[[Asker, int], Ask]] = {
    "upload": Asker.upload,
    "data set": Asker.dataset,
    "file": Asker.file,
    "train": Asker.train,
    "fine-tuning": Asker.fine_tuning,
    "cancel": Asker.cancellation,
    "compose": Asker.composition,
    "merge": Asker.merge,
    "alias": Asker.alias,
    "remove alias": Asker.alias_removal,
    "delete version": Asker.deletion,
    "publish": Asker.visibility,
    "key": Asker.key,
    "revoke": Asker.revocation,
    "project": Asker.project,
    "remove project": Asker.project_removal,
}
