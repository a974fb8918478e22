"""Messages from an engine replica to an API process. All can be pickled.

While a cluster is upgraded, the sender and the receiver may run adjacent versions of the code, so a new field
needs a default.
"""

from dataclasses import dataclass, field

from adapters.errors import SmoloraError
from server.engine.request import EngineStats, SequenceOutput
from server.errors import TryAgain

APP = "smolora"
DEPLOYMENT = "engine"
"""Ray Serve's names of the application and of the replicas' deployment."""


@dataclass(frozen=True)
class Welcome:
    """The first message to an API process: what doesn't change while the replica runs."""

    base_digest: str
    max_num_tokens: int  # of one sequence
    vocab_size: int
    block_size: int  # tokens of a block of the prefix cache
    max_in_flight: int | None = None  # running and waiting sequences; None: from an older version
    kind: str | None = None  # of processor and code: equal kinds give equal bits; None: from an older version


@dataclass(frozen=True)
class ReplicaState:
    """The state of a replica's engine at one moment.

    `num_own` of the `num_in_flight` sequences belong to the API process that receives this message.

    `num_followers` is the number of API processes that receive such messages, including this one.
    """

    stats: EngineStats
    num_in_flight: int
    num_own: int
    refusal: TryAgain | None = None  # the error that a project with nothing in flight would get
    blocks: tuple[int, ...] | None = None  # `block_hash`es of the prefix cache; None: unchanged
    num_followers: int = 1
    is_reporter: bool = True  # of all receivers, this one publishes the replica's statistics as metrics


@dataclass(frozen=True)
class Batch:
    """The outputs of one or several engine steps, for all requests of one API process."""

    outputs: tuple[SequenceOutput, ...] = ()
    failures: tuple[tuple[str, SmoloraError], ...] = ()  # a request's id, and the error that ends it
    state: ReplicaState | None = None


@dataclass
class Outbox:
    """Outputs for one API process that haven't been sent yet."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    failures: list[tuple[str, SmoloraError]] = field(default_factory=list)

    def take(self, state: ReplicaState | None) -> Batch:
        """Return a batch with everything in the outbox and with `state`, and empty the outbox."""
        batch = Batch(tuple(self.outputs), tuple(self.failures), state)
        self.outputs, self.failures = [], []
        return batch


def block_hash(key: bytes) -> int:
    """Return a short hash of a block's key, so that a `ReplicaState` with all blocks stays small.

    A collision only costs time.
    """
    return int.from_bytes(key[:8])
