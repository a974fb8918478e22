"""The server's event loop handles a few ready files in each turn."""

import asyncio
import itertools
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from selectors import EVENT_READ, EVENT_WRITE

import pytest

from server.serve.event_loop import MAX_READY, FewAtOnce, new_event_loop

NUM = 3 * MAX_READY


@pytest.fixture
def readable() -> Iterator[list[socket.socket]]:
    """Yield sockets that have bytes to read."""
    with ExitStack() as stack:
        found = []
        for _ in range(NUM):
            own, other = (stack.enter_context(end) for end in socket.socketpair())
            other.sendall(b"a")
            found.append(own)
        yield found


def test_all_ready_files_have_their_turn(readable: list[socket.socket]) -> None:
    with FewAtOnce() as selector:
        for number, one in enumerate(readable):
            selector.register(one, EVENT_READ, number)
        for _ in range(2):  # they stay ready, as nobody reads
            rounds = [[key.data for key, _ in selector.select(1)] for _ in range(NUM // MAX_READY)]
            assert [len(one) for one in rounds] == [MAX_READY] * (NUM // MAX_READY)
            assert {number for one in rounds for number in one} == set(range(NUM))


def test_a_file_that_is_gone_meanwhile_is_left_out(readable: list[socket.socket]) -> None:
    with FewAtOnce() as selector:
        for one in readable:
            selector.register(one, EVENT_READ)
        first = {key.fileobj for key, _ in selector.select(1)}
        gone, changed, *others = (one for one in readable if one not in first)
        selector.unregister(gone)
        selector.modify(changed, EVENT_READ | EVENT_WRITE)
        later = [key.fileobj for _ in range(2) for key, _ in selector.select(1)]
        assert sorted(map(id, later)) == sorted(map(id, others))
        again = {key.fileobj: events for _ in range(3) for key, events in selector.select(1)}
        assert again[changed] == EVENT_READ | EVENT_WRITE


def test_other_work_does_not_wait_for_all_ready_files(readable: list[socket.socket]) -> None:
    """As many files are read between two turns of a task as the selector returns at once."""
    num_read = 0

    def read(one: socket.socket) -> None:
        nonlocal num_read
        one.recv(1)
        num_read += 1

    async def turns() -> list[int]:
        loop = asyncio.get_running_loop()
        for one in readable:
            loop.add_reader(one, read, one)
        seen = []
        while num_read < NUM:
            await asyncio.sleep(0)
            seen.append(num_read)
        for one in readable:
            loop.remove_reader(one)
        return seen

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        seen = runner.run(turns())
    assert max(after - before for before, after in itertools.pairwise(seen)) <= MAX_READY
