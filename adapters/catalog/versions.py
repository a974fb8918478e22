"""Adapters, versions and parts of compositions as plain values, and the canonical form of a set of parts."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from typing import Literal

import sqlalchemy as sa

from adapters.lora import AdapterRef

Kind = Literal["adapter", "composition"]
VERDICT = "verdict"
"""The key of `NewVersion.config` under which a job stores how the version compares with the latest one before it:
"better", "worse" or "can't tell"."""


@dataclass(frozen=True)
class Part:
    """A term of an expression, resolved to one version of an adapter. Compositions are never parts."""

    name: str
    version: int
    digest: str
    weight: float


EVALUATION = "evaluation"
"""The key of a composition's `config` under which an evaluation's `id` and `results` are stored."""


@dataclass(frozen=True)
class VersionLimits:
    """The most versions of a project, and of those that one of its API keys published. None means no limit.

    `num_reserved` counts versions that will be published later, in a connection's transaction: of a project, or of
    one of its keys if the key's id is given, too.
    """

    of_project: int | None = None
    of_key: int | None = None
    num_reserved: Callable[[sa.Connection, str, str | None], int] = lambda connection, project, key_id: 0


@dataclass(frozen=True)
class NewVersion:
    """An adapter to publish.

    `bytes` is its size in the store. `parent` is the expression that it was made from, with version numbers.
    `base_digest` is the digest of the base's weights, and `data_digest` is that of the rows it was trained on.
    `config` is a JSON document for people that says how it was made.
    """

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
    base_digest: str | None = None
    data_digest: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    key_id: str | None = None  # of the API key that published it

    @property
    def verdict(self) -> str | None:
        """Whether its job found it "better" or "worse" than the previous latest version, or "can't tell".

        None if the job didn't compare them.
        """
        found = self.config.get(VERDICT)
        return found if isinstance(found, str) else None

    @property
    def moves_latest(self) -> bool:
        """Whether `latest` moves to the version when it is published, if nobody moved `latest` back.

        It doesn't move if the version's job found it worse than the previous latest version. A job of an older
        release of smolora made no such comparison; then it doesn't move if the version's loss is above the base's.
        It moves in any case if "latest" is the alias that the job gives to the version.
        """
        if self.config.get("alias") == "latest":
            return True
        if "publish_metric" in self.config:
            return self.verdict != "worse"
        tuned, base = self.metrics.get("eval_loss"), self.metrics.get("base_eval_loss")
        return tuned is None or base is None or tuned <= base


@dataclass(frozen=True, kw_only=True)
class Version(NewVersion):
    """A published version of an adapter or of a composition. A composition has `parts` but no bytes.

    A composition's digest covers its parts and their weights; its rank and parameters are the sums of its parts'
    ranks and parameters.
    """

    version: int
    created_at: datetime  # in UTC
    parts: tuple[Part, ...] = ()

    @property
    def kind(self) -> Kind:
        return "composition" if self.parts else "adapter"


@dataclass(frozen=True)
class Adapter:
    """A name with its versions, oldest first, and its aliases without `latest`.

    `versions` may be only the newest ones, or a page of older ones. `next` is then the oldest version on the page,
    if there are older ones, else None. `latest_version` is the version `latest`, which may not be on the page.
    """

    name: str
    latest: int
    aliases: Mapping[str, int]
    versions: tuple[Version, ...]
    latest_version: Version
    is_public: bool = False
    next: int | None = None

    @property
    def kind(self) -> Kind:
        return self.latest_version.kind


@dataclass(frozen=True)
class Origin:
    """The base that several versions share, and their warnings. A field is None if the versions disagree."""

    base_model: str | None
    base_digest: str | None
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, versions: Iterable[Version]) -> "Origin":
        """Return the common base of `versions`, with the warnings of all the versions."""
        found = tuple(versions)
        warnings = [f"{version.name}@{version.version}: {text}" for version in found for text in version.warnings]
        models, digests = {version.base_model for version in found}, {version.base_digest for version in found}
        if len(digests - {None}) > 1:
            warnings.append("its parts were made on different bases")
        return cls(
            base_model=models.pop() if len(models) == 1 else None,
            base_digest=digests.pop() if len(digests) == 1 else None,
            warnings=tuple(warnings),
        )


def combine(parts: Iterable[Part]) -> tuple[AdapterRef, ...]:
    """Return the parts' digests and weights in canonical form: one entry for each digest, no zero weights, sorted.

    The weights of a digest are summed exactly, as the decimals that were written: 0.1 + 0.2 - 0.3 is zero. The
    order of the parts doesn't matter.
    """
    sums: dict[str, Fraction] = {}
    for part in parts:
        sums[part.digest] = sums.get(part.digest, Fraction(0)) + Fraction(repr(part.weight))
    return tuple(AdapterRef(digest, float(weight)) for digest, weight in sorted(sums.items()) if weight)


def gather(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return one part for each version, in the order of first mention.

    If a version occurs several times, its weights are summed. A version whose sum is zero is left out.
    """
    sums: dict[tuple[str, int, str], Fraction] = {}
    for part in parts:
        key = (part.name, part.version, part.digest)
        sums[key] = sums.get(key, Fraction(0)) + Fraction(repr(part.weight))
    return tuple(Part(*key, float(weight)) for key, weight in sums.items() if weight)


def times(weight: float, other: float) -> float:
    """Return the product of two decimals as written: 0.7 times 0.1 is 0.07."""
    return float(Fraction(repr(weight)) * Fraction(repr(other)))


def blend_digest(parts: Iterable[Part]) -> str:
    """Return the SHA-256 (hex) of the parts in their canonical form (see `combine`).

    So compositions of equal effect have equal digests.
    """
    pairs = "".join(f"|{digest}*{weight!r}" for digest, weight in combine(parts))
    return hashlib.sha256(f"smolora-blend-v1{pairs}".encode()).hexdigest()
