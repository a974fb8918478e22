"""Statistics of a run of inputs: counts, outcomes, costs, and findings.

A finding is saved once for each place that raised it, in a file whose name begins with the target's, so that the
file alone suffices to replay it. The inputs before it are saved too if the target is stateful.
"""

import hashlib
import json
import time
import traceback
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from tests.stress.fuzzing.bounds import Cost

ROOT = Path(__file__).parents[3]
CACHE = ROOT / ".cache" / "fuzz"
_KEPT_EVERY = 1.0  # seconds


@dataclass
class Finding:
    """A fault and the first input that caused it."""

    where: str
    file: str
    trace: str
    count: int = 1


@dataclass
class Tally:
    """Statistics of one target, saved to a file continually: an input may kill the process."""

    inputs: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0  # seconds of processor time
    peak: int = 0  # most bytes that one input added
    resident: int = 0  # bytes at the end
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, outcome: str, cost: Cost) -> bool:
        """Count an input; return whether it was the slowest."""
        self.inputs += 1
        self.outcomes[outcome] += 1
        self.peak = max(self.peak, cost.memory)
        is_slowest = cost.cpu_seconds > self.slowest
        self.slowest = max(self.slowest, cost.cpu_seconds)
        return is_slowest

    def merge(self, other: "Tally") -> None:
        """Add another process's statistics."""
        self.inputs += other.inputs
        self.seconds += other.seconds
        self.outcomes += other.outcomes
        self.slowest, self.peak = max(self.slowest, other.slowest), max(self.peak, other.peak)
        self.resident = other.resident
        for where, finding in other.findings.items():
            known = self.findings.setdefault(where, finding)
            known.count += finding.count if known is not finding else 0

    def to_json(self) -> str:
        findings = {where: asdict(finding) for where, finding in self.findings.items()}
        return json.dumps({**vars(self), "findings": findings})

    @classmethod
    def read(cls, path: Path) -> Self:
        document = json.loads(path.read_text())
        findings = {where: Finding(**finding) for where, finding in document.pop("findings").items()}
        return cls(**{**document, "outcomes": Counter(document["outcomes"]), "findings": findings})


class Book:
    """A target's folder with its statistics."""

    def __init__(self, name: str, num_before: int = 0, cache: Path = CACHE) -> None:
        self.name = name
        self._before: deque[bytes] = deque(maxlen=num_before)
        self.folder = cache / name
        self.findings = self.folder / "findings"
        self.findings.mkdir(parents=True, exist_ok=True)
        self.tally = Tally()
        self._begun = time.monotonic()
        self._kept = 0.0

    @property
    def path(self) -> Path:
        return self.folder / "tally.json"

    def took(self, data: bytes, outcome: str, cost: Cost) -> None:
        self._before.append(data)
        if self.tally.add(outcome, cost):
            (self.folder / "slowest").write_bytes(data)
        if time.monotonic() - self._kept > _KEPT_EVERY:
            self.keep()

    def failed(self, data: bytes, error: BaseException) -> bool:
        """Save the input unless this fault has one already; return whether it is new."""
        self.tally.inputs += 1
        self.tally.outcomes["finding"] += 1
        where = place_of(error)
        if (known := self.tally.findings.get(where)) is not None:
            known.count += 1
            self._before.append(data)
            return False
        trace = "".join(traceback.format_exception(error)[-6:])
        path = self.findings / f"{self.name}-{type(error).__name__}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        self._save_those_before(path)
        self._before.append(data)
        self.tally.findings[where] = Finding(where, str(path), trace[-4000:])
        self.keep()
        return True

    def _save_those_before(self, path: Path) -> None:
        if self._before:
            before_of(path).mkdir(exist_ok=True)
        for number, data in enumerate(self._before):
            (before_of(path) / f"{number:04}").write_bytes(data)

    def keep(self) -> None:
        """Save the statistics."""
        self._kept = time.monotonic()
        self.tally.seconds = self._kept - self._begun
        self.tally.resident = _resident()
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(self.tally.to_json())
        unfinished.replace(self.path)


def before_of(path: Path) -> Path:
    """Return the folder of the inputs before this one."""
    return path.with_name(f"{path.name}.before")


def place_of(error: BaseException) -> str:
    """Return the exception and the innermost line of our code in its traceback, or the place that the exception
    names."""
    if (where := getattr(error, "where", None)) is not None:
        return f"{type(error).__name__}: {where}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if ".venv" not in frame.filename]
    ours = [frame for frame in frames if frame.filename.startswith(str(ROOT))] or frames
    place = f"{ours[-1].filename.removeprefix(f'{ROOT}/')}:{ours[-1].lineno}" if ours else "nowhere"
    return f"{type(error).__name__} at {place}"


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
