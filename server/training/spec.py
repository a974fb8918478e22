"""Stored JSON, back as the frozen dataclasses that it was made from, every field checked against its type.

What a training job is asked to do, as plain values that are stored with the job and never change.

`to_document` and `from_document` are inverse, so that a worker reads exactly what was submitted. Every value is
resolved: nothing here means "the default" any more.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar, cast

from pydantic import TypeAdapter

from adapters.lora import MODULES

_Kind = TypeVar("_Kind")
_readers: dict[object, object] = {}
"""By kind: making one takes milliseconds."""


def read_document(kind: type[_Kind], document: object) -> _Kind:
    """What `dataclasses.asdict` made of a `kind`, also once it was JSON: lists become tuples, texts become dates.

    Fields that `kind` doesn't have are left out. Raises ValueError where one is missing or of another type.
    """
    if kind not in _readers:
        _readers[kind] = TypeAdapter(kind)
    return cast("TypeAdapter[_Kind]", _readers[kind]).validate_python(document)


Method = Literal["lora", "full"]
Init = Literal["gaussian", "kaiming", "pissa", "olora"]
Schedule = Literal["cosine", "linear", "constant"]
Overlong = Literal["truncate", "refuse"]
PublishIf = Literal["always", "improves_base", "improves_latest"]

LEARNING_RATES: Mapping[Method, float] = {"lora": 1e-3, "full": 3e-5}
"""What is taken where none is given."""


@dataclass(frozen=True)
class LoraSpec:
    """The adapter's shape. `target_modules` are names in `adapters.lora.MODULES`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = MODULES
    init: Init = "gaussian"
    use_rslora: bool = False


@dataclass(frozen=True)
class TrainingSpec:
    """How it is trained. `batch_size` is rows of an optimizer step, `max_length` tokens of a row."""

    epochs: int = 3
    max_steps: int | None = None  # overrides epochs
    learning_rate: float = LEARNING_RATES["lora"]
    batch_size: int = 8
    max_length: int = 512
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_steps: int | None = None  # None: at the end only
    checkpoint_steps: int | None = None  # None: about every 30 s
    early_stopping_patience: int | None = None  # evaluations without a lower loss
    packing: bool = True
    overlong: Overlong = "truncate"

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps over `num_rows` training rows."""
        return self.max_steps or self.epochs * -(-num_rows // self.batch_size)


@dataclass(frozen=True)
class JobSpec:
    """All that decides a job's result, besides its data and the base, and what becomes of it."""

    name: str
    method: Method = "lora"
    lora: LoraSpec = field(default_factory=LoraSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    start_from: str | None = None  # "name@version", pinned
    start_from_digest: str | None = None
    publish_if: PublishIf = "always"
    alias: str | None = None
    description: str = ""

    @property
    def parents(self) -> tuple[str, ...]:
        """The digests of the adapters whose bytes the job needs."""
        return () if self.start_from_digest is None else (self.start_from_digest,)

    def to_document(self) -> dict[str, object]:
        """JSON-ready."""
        document = asdict(self)
        document["lora"]["target_modules"] = list(self.lora.target_modules)
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> "JobSpec":
        """What `to_document` made. Raises ValueError on anything else."""
        return read_document(cls, document)
