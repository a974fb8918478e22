"""What a replica tells an API process, besides the engine's own messages. All of it can be pickled.

Both sides may be of neighbouring versions while a cluster is upgraded: a field that is added needs a default.
"""

from dataclasses import dataclass, field

from adapters.errors import SmoloraError
from server.engine.request import EngineStats, SequenceOutput
from server.errors import TryAgain


@dataclass(frozen=True)
class Welcome:
    """The first message: what stays as it is."""

    base_digest: str
    max_num_tokens: int  # of one sequence
    vocab_size: int
    block_size: int  # tokens of a block of the prefix cache
    max_in_flight: int | None = None  # sequences that run and wait; None: it doesn't say


@dataclass(frozen=True)
class ReplicaState:
    """A replica's engine at one moment. `num_own` of the sequences `num_in_flight` are the receiver's.

    `num_followers`: the API processes that are told, the receiver among them.
    """

    stats: EngineStats
    num_in_flight: int
    num_own: int
    refusal: TryAgain | None = None  # what a project that has nothing in flight would be refused for
    blocks: tuple[int, ...] | None = None  # of the prefix cache, as `block_hash` has them; None: as told before
    num_followers: int = 1


@dataclass(frozen=True)
class Batch:
    """News of a step, or several, of all requests of one API process."""

    outputs: tuple[SequenceOutput, ...] = ()
    failures: tuple[tuple[str, SmoloraError], ...] = ()  # a request's id, and what ends all of it
    state: ReplicaState | None = None


@dataclass
class Outbox:
    """What gathers for one API process until it is sent."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    failures: list[tuple[str, SmoloraError]] = field(default_factory=list)

    def take(self, state: ReplicaState | None) -> Batch:
        """All of it, after which there is none."""
        batch = Batch(tuple(self.outputs), tuple(self.failures), state)
        self.outputs, self.failures = [], []
        return batch


def block_hash(key: bytes) -> int:
    """A block's key, short enough to tell of all blocks. Where two are equal by chance, that costs time alone."""
    return int.from_bytes(key[:8])
