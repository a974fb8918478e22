"""Names that change all the time: one thread per name publishes, moves aliases, rolls back, deletes and
re-uploads.

Only that thread changes its name, so it knows what the name, its alias and its composition meant at any time.
`Timeline` says whether an answer's adapters were a possible meaning during the request.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from tests.server.api.adapters.peft_files import as_parts

Leaves = tuple[tuple[str, int, float], ...]  # name, version, weight
Files = tuple[bytes, bytes]

ALIAS = "prod"
MIX_WEIGHTS = (0.5, -0.25)


@dataclass
class Timeline:
    """The meanings of a reference: changes with the start and end of their requests. Written by one thread."""

    changes: list[tuple[float, float, Leaves | None]] = field(default_factory=list)

    def set(self, began: float, ended: float, value: Leaves | None) -> None:
        if self.now != value:
            self.changes.append((began, ended, value))

    @property
    def now(self) -> Leaves | None:
        return self.changes[-1][2] if self.changes else None

    def possible(self, began: float, ended: float) -> list[Leaves | None]:
        """Return all meanings that were possible at some moment between the two times; None: it didn't exist."""
        changes = [(0.0, 0.0, None), *self.changes]
        ends = [change[1] for change in changes[1:]] + [float("inf")]
        return [
            value for (start, _, value), end in zip(changes, ends, strict=True) if start <= ended and end >= began
        ]


class Changer:
    """Changes one name, its alias and its composition; `timelines` are by expression."""

    def __init__(self, url: str, number: int, num_names: int, files: Sequence[Files], pause: float) -> None:
        self.name, self.mix = f"n{number}", f"mix{number}"
        self.neighbour = f"n{(number + 1) % num_names}"
        self.timelines: dict[str, Timeline] = {
            key: Timeline() for key in (self.name, f"{self.name}@{ALIAS}", self.mix)
        }
        self.digests: dict[tuple[str, int], str] = {}
        self.seeds: dict[str, int] = {}  # by digest
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self._url = url
        self._files = files
        self._pause = pause
        self._random = random.Random(number)
        self._versions: list[int] = []
        self._latest: int | None = None
        self._alias: int | None = None

    def run(self, stop: threading.Event) -> None:
        """Make changes until `stop` is set."""
        choices: list[Callable[[httpx.Client], None]] = [self.upload, self.upload, self.upload, self.point]
        choices += [self.point, self.roll_back, self.delete_version, self.delete_version, self.delete_all]
        choices += [self.compose, self.compose, self.drop_mix]
        try:
            with httpx.Client(base_url=self._url, timeout=120, trust_env=False) as client:
                self.upload(client)
                while not stop.wait(self._pause * self._random.uniform(0.2, 1.8)):
                    self._random.choice(choices)(client)
        except Exception as error:
            self.faults.append(f"{self.name}: {type(error).__name__}: {error}")

    def upload(self, client: httpx.Client) -> None:
        seed = self._random.randrange(len(self._files))
        began, response = self._send(client, "POST", f"/adapters/{self.name}", files=as_parts(*self._files[seed]))
        if self._expect("upload", response, 201):
            version = response.json()
            self._versions.append(version["version"])
            self.digests[self.name, version["version"]] = version["digest"]
            self.seeds[version["digest"]] = seed
            self._latest = version["version"]
            self._record_alias(began)

    def point(self, client: httpx.Client) -> None:
        self._move(client, ALIAS)

    def roll_back(self, client: httpx.Client) -> None:
        self._move(client, "latest")

    def delete_version(self, client: httpx.Client) -> None:
        if not self._versions:
            return
        version, force = self._random.choice(self._versions), self._random.random() < 0.5
        path = f"/adapters/{self.name}/{version}" + ("?force=true" if force else "")
        began, response = self._send(client, "DELETE", path)
        held = version == self._alias and not force
        if self._expect(
            "delete a version", response, *((409,) if held else (204, 409))
        ):  # a composition may use it
            self._gone(began, [version])

    def delete_all(self, client: httpx.Client) -> None:
        began, response = self._send(client, "DELETE", f"/adapters/{self.name}?force=true")
        if self._expect("delete all", response, *((204, 409) if self._versions else (404,))):
            self._gone(began, list(self._versions))
            if self._random.random() < 0.8:
                self.upload(client)

    def compose(self, client: httpx.Client) -> None:
        mine, theirs = MIX_WEIGHTS
        body = {"expression": f"{self.name}*{mine}+{self.neighbour}*{theirs}"}
        began, response = self._send(client, "POST", f"/compositions/{self.mix}", json=body)
        may_be = (200, 201, 404) if self._versions else (404,)  # 200: unchanged; 404: the neighbour is gone
        if self._expect("compose", response, *may_be):
            parts = response.json()["parts"]
            leaves = tuple((part["name"], part["version"], part["weight"]) for part in parts)
            self.timelines[self.mix].set(began, time.monotonic(), leaves)

    def drop_mix(self, client: httpx.Client) -> None:
        began, response = self._send(client, "DELETE", f"/adapters/{self.mix}")
        if self._expect("drop a composition", response, 404 if self.timelines[self.mix].now is None else 204):
            self.timelines[self.mix].set(began, time.monotonic(), None)

    def _move(self, client: httpx.Client, alias: str) -> None:
        version = self._random.choice(self._versions or [1])
        path = f"/adapters/{self.name}/aliases/{alias}"
        began, response = self._send(client, "PUT", path, json={"version": version})
        if self._expect(f"move {alias}", response, 200 if self._versions else 404):
            if alias == ALIAS:
                self._alias = version
            else:
                self._latest = version
            self._record_alias(began)

    def _gone(self, began: float, versions: list[int]) -> None:
        self._versions = [version for version in self._versions if version not in versions]
        if self._alias in versions:
            self._alias = None
        if self._latest in versions:
            self._latest = max(self._versions, default=None)
        self._record_alias(began)

    def _record_alias(self, began: float) -> None:
        ended = time.monotonic()
        for key, version in ((self.name, self._latest), (f"{self.name}@{ALIAS}", self._alias)):
            self.timelines[key].set(began, ended, None if version is None else ((self.name, version, 1.0),))

    def _send(
        self,
        client: httpx.Client,
        method: str,
        path: str,
        json: object = None,
        files: Mapping[str, tuple[str, bytes]] | None = None,
    ) -> tuple[float, httpx.Response]:
        began = time.monotonic()
        return began, client.request(method, path, json=json, files=files)

    def _expect(self, what: str, response: httpx.Response, *statuses: int) -> bool:
        """Return whether the request succeeded; any status but these is a fault."""
        self.counts[f"{what}: {response.status_code}"] += 1
        if response.status_code not in statuses:
            self.faults.append(f"{self.name}: {what}: {response.status_code} {response.text[:300]}")
        return response.is_success


def digests_of(changers: Sequence[Changer]) -> Mapping[tuple[str, int], str]:
    """Return the digests of all versions that ever existed."""
    return {key: digest for changer in changers for key, digest in changer.digests.items()}
