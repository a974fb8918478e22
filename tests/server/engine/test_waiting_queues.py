"""The digests of waiting sequences' adapters."""

from adapters.lora import AdapterRef
from server.engine.request import GenerationRequest
from server.engine.sequence import Sequence
from server.engine.waiting import WaitingQueues


def waiting(project: str, *digests: str) -> Sequence:
    refs = tuple(AdapterRef(digest) for digest in digests)
    return Sequence(GenerationRequest(f"{project}-{digests}", (1, 2), adapters=refs, project=project), 0, 0.0, 4)


def test_waiting_adapters_are_listed_by_digest() -> None:
    queues = WaitingQueues()
    assert queues.digests() == frozenset()
    for sequence in (base := waiting("a"), both := waiting("a", "x", "y"), waiting("b", "x"), waiting("b", "x")):
        queues.add(sequence)
    assert queues.digests() == {"x", "y"}
    queues.remove(both)
    queues.remove(base)
    assert queues.digests() == {"x"}


def test_a_snapshot_lists_a_limited_number_of_sets() -> None:
    queues = WaitingQueues()
    for number in range(1000):
        queues.add(waiting("a", str(number)))
    assert 100 < len(queues.digests()) < 500
