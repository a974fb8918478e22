"""What the catalog knows of adapters, as plain values, and the canonical form of a set of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction


@dataclass(frozen=True)
class NewVersion:
    """An adapter to publish. `bytes` is its size in the store, `parent` the adapter that training started from."""

    name: str
    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    parameters: int
    bytes: int
    base_model: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: str | None = None
    job_id: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Version(NewVersion):
    """One published adapter."""

    version: int
    created_at: datetime  # in UTC


@dataclass(frozen=True)
class Adapter:
    """A name with its versions, oldest first, and its aliases without `latest`."""

    name: str
    latest: int
    aliases: Mapping[str, int]
    versions: tuple[Version, ...]


@dataclass(frozen=True)
class Part:
    """A term of an expression, resolved to one version."""

    name: str
    version: int
    digest: str
    weight: float


def combine(parts: Iterable[Part]) -> tuple[tuple[str, float], ...]:
    """Digests and weights in canonical form: one entry for each digest, no zero weights, sorted.

    Sums are exact in the decimals that were written, so that 0.1 + 0.2 - 0.3 drops out and order doesn't matter.
    """
    sums: dict[str, Fraction] = {}
    for part in parts:
        sums[part.digest] = sums.get(part.digest, Fraction(0)) + Fraction(repr(part.weight))
    return tuple((digest, float(weight)) for digest, weight in sorted(sums.items()) if weight)
