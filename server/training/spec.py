"""The specification of a training job: plain values that are stored with the job and never change.

`to_document` and `from_document` are inverse, so that a worker reads exactly what was submitted. Every value is
resolved: no field stands for a default that is chosen later.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, Self, TypeVar, cast

from pydantic import TypeAdapter

from adapters.lora import MODULES

_Kind = TypeVar("_Kind")
_readers: dict[object, object] = {}
"""Type adapters, cached by kind: creating one takes milliseconds."""


def read_document(kind: type[_Kind], document: object) -> _Kind:
    """Return the instance of `kind`, a dataclass, from which `dataclasses.asdict` made `document`.

    The document may have been stored as JSON: lists become tuples again, and texts become dates. Unknown fields
    are ignored. Raise ValueError if a field is missing or has another type.
    """
    if kind not in _readers:
        _readers[kind] = TypeAdapter(kind)
    return cast("TypeAdapter[_Kind]", _readers[kind]).validate_python(document)


Method = Literal["lora", "full"]
Init = Literal["gaussian", "kaiming", "pissa", "olora"]
Schedule = Literal["cosine", "linear", "constant"]
Overlong = Literal["auto", "truncate", "split", "drop", "refuse"]
"""What to do with rows longer than `max_length`. `auto` splits texts into windows, cuts other rows at the end, and
drops rows whose prompt leaves nothing to train on."""
PublishIf = Literal["always", "improves_base", "improves_latest", "not_worse"]
Metric = Literal["loss", "exact_match", "accuracy", "brier"]
"""What decides on publishing: `accuracy` and `brier` are those of held-out decisions."""
DECISION_METRICS: frozenset[Metric] = frozenset({"accuracy", "brier"})
LOWER_IS_BETTER: frozenset[Metric] = frozenset({"loss", "brier"})
COMPARE_WITH_LATEST: frozenset[PublishIf] = frozenset({"improves_latest", "not_worse"})

LEARNING_RATES: Mapping[Method, float] = {"lora": 1e-3, "full": 3e-5}
"""The default learning rate of each method."""
AUTO_STEPS = 100
"""The number of optimizer steps that chosen epochs come to, if `AUTO_EPOCHS` allow it."""
AUTO_EPOCHS = (3, 20)
"""The fewest and the most epochs that are chosen."""

ALPHA, RSLORA_ALPHA = 32.0, 8.0
"""The default alpha at every rank, and with `use_rslora`: at rank 16, both scale B A by 2."""
INIT_STD = 1 / 16
"""The standard deviation of A with `init` gaussian, at every rank."""
MAX_MEASURED_RANK = 512
"""The highest rank of an adapter that a job measures, such as a name's latest version: the highest that a job can
publish. An uploaded adapter of any rank must not make jobs run out of memory."""


def default_alpha(*, use_rslora: bool) -> float:
    """Return the alpha for a request that has none. docs/training.md says why it doesn't depend on the rank."""
    return RSLORA_ALPHA if use_rslora else ALPHA


@dataclass(frozen=True)
class LoraSpec:
    """The shape of a job's adapter. `target_modules` are names in `adapters.lora.MODULES`."""

    rank: int = 16
    alpha: float = ALPHA
    dropout: float = 0.0
    target_modules: tuple[str, ...] = MODULES
    init: Init = "gaussian"
    use_rslora: bool = False
    init_std: float = INIT_STD  # of A, with init gaussian


@dataclass(frozen=True)
class TrainingSpec:
    """The training loop's settings. `batch_size` is rows per optimizer step, `max_length` tokens per row."""

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
    early_stopping_patience: int | None = None  # evaluations without a gain
    packing: bool = True
    overlong: Overlong = "truncate"
    auto_epochs: bool = False  # whether `epochs` were chosen by `with_epochs`

    def steps_per_epoch(self, num_rows: int) -> int:
        """Return the number of optimizer steps of a pass over `num_rows` training rows."""
        return -(-num_rows // self.batch_size)

    def total_steps(self, num_rows: int) -> int:
        """Return the number of optimizer steps of a job with `num_rows` training rows."""
        return self.max_steps or self.epochs * self.steps_per_epoch(num_rows)

    def with_epochs(self, num_rows: int) -> Self:
        """Return the settings with as many epochs as take about `AUTO_STEPS` steps over `num_rows` rows."""
        fewest, most = AUTO_EPOCHS
        epochs = -(-AUTO_STEPS // self.steps_per_epoch(num_rows))
        return replace(self, epochs=min(max(epochs, fewest), most), auto_epochs=True)


@dataclass(frozen=True)
class JobSpec:
    """How a job trains and publishes. This, the job's data and the base decide the result."""

    name: str
    method: Method = "lora"
    lora: LoraSpec = field(default_factory=LoraSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    start_from: str | None = None  # "name@version", pinned
    start_from_digest: str | None = None
    publish_if: PublishIf = "always"
    publish_metric: Metric = "loss"
    alias: str | None = None
    description: str = ""

    @property
    def parents(self) -> tuple[str, ...]:
        """The digests of the adapters whose bytes the job needs."""
        return () if self.start_from_digest is None else (self.start_from_digest,)

    def to_document(self) -> dict[str, object]:
        """Return JSON-ready values."""
        document = asdict(self)
        document["lora"]["target_modules"] = list(self.lora.target_modules)
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> "JobSpec":
        """Read what `to_document` made. Raise ValueError for anything else."""
        lora = document.get("lora")
        if isinstance(lora, Mapping) and isinstance(rank := lora.get("rank"), int) and rank > 0:
            # before it was stored, A's standard deviation was 1/rank
            document = {**document, "lora": {"init_std": 1 / rank, **lora}}
        return read_document(cls, document)
