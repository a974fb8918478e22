"""The server of `make fairness`: the real base, two projects with keys and adapters, a small pool for adapters."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from server.model.base.source import EMBEDDED, resolve_base
from server.model.base.weights import load_base
from tests.end_to_end import server_process
from tests.end_to_end.server_process import ServerProcess
from tests.kits.cache import CACHE
from tests.server.api.adapters.peft_files import ALL_PATHS, as_parts, peft_files
from tests.stress.fairness.greedy import DATASET_BYTES, NARROW, WIDE, Target
from tests.stress.fairness.modest import KINDS, Modest

OPERATOR = "operator-of-the-fairness-run"
POOL_BYTES = 39_200_000
WIDE_RANK = 64
"""On all linear modules: all the rows of a pool of POOL_BYTES."""
MODEST_ADAPTER = "mine"


@dataclass(frozen=True)
class Projects:
    """The clients' data, which outlives a server."""

    model: Path
    modest_secret: str
    target: Target  # its url is of the first server


def start(home: Path, model: Path, time_slice: float) -> ServerProcess:
    """Start a server. A version that doesn't know the time slice only warns of the variable."""
    variables = server_process.environment() | {"SMOLORA_TRAIN_SLICE": f"{time_slice:g}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_process, "environment", lambda: variables)
        return ServerProcess(
            home,
            key=OPERATOR,
            api_keys=OPERATOR,
            model=model,
            workers=1,
            adapter_cache_bytes=POOL_BYTES,
        )


def set_up(home: Path, time_slice: float) -> tuple[ServerProcess, Projects]:
    """Start a server, and make keys, adapters and a data set."""
    model = resolve_base(EMBEDDED, CACHE)
    shape = load_base(model).config.shape
    server = start(home, model, time_slice)
    try:
        modest, greedy = (_key(server, project) for project in ("modest", "greedy"))
        for secret, name, rank in ((modest, MODEST_ADAPTER, 8), (greedy, WIDE, WIDE_RANK), (greedy, NARROW, 16)):
            files = as_parts(*peft_files(rank, rank=rank, shape=shape, paths=ALL_PATHS))
            made = server.client.post(f"/adapters/{name}", files=files, headers=_bearer(secret))
            assert made.status_code == 201, made.text
        rows = {"file": ("rows.jsonl", _rows())}
        stored = server.client.post("/datasets", files=rows, headers=_bearer(greedy))
        assert stored.status_code == 201, stored.text
        target = Target(server.url, greedy, stored.json()["id"], as_parts(*peft_files(32, rank=16, shape=shape)))
    except BaseException:
        server.close()
        raise
    return server, Projects(model, modest, target)


@contextmanager
def modest_client(server: ServerProcess, projects: Projects) -> Iterator[Modest]:
    """Yield the modest project's client once the server has answered it."""
    modest = Modest(server.url, projects.modest_secret, MODEST_ADAPTER)
    try:
        for kind in (*KINDS, *KINDS):
            assert (fault := modest.ask(kind).fault) is None, fault
        yield modest
    finally:
        modest.close()


def use_code(directory: Path) -> None:
    """Have servers that are started from now on run the code in `directory`."""
    os.environ["PYTHONPATH"] = str(directory.resolve())


def _key(server: ServerProcess, project: str) -> str:
    made = server.client.post("/keys", json={"name": project, "project": project, "scopes": ["generate", "train"]})
    assert made.status_code == 201, made.text
    return str(made.json()["secret"])


def _bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def _rows() -> bytes:
    """Return rows of DATASET_BYTES in all, as JSON lines."""
    line = json.dumps(
        {"prompt": "The ship that came in today: ", "completion": "from afar and full of grain. " * 12}
    )
    return "\n".join(f'{line[:-2]}{number}"}}' for number in range(DATASET_BYTES // (len(line) + 6))).encode()
