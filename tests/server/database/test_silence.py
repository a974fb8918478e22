"""How long the database has not answered, and what a server may still serve."""

from collections.abc import Callable

import pytest

from adapters.errors import Silent
from server.database.silence import NOTICED_SECONDS, PROBE_SECONDS, Outage, Silence


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def silence(clock: Clock) -> Silence:
    return Silence(5.0, clock)


def test_a_short_silence_does_not_count(silence: Silence, clock: Clock) -> None:
    silence.asked()
    clock.now += NOTICED_SECONDS
    assert silence.seconds == 0
    clock.now += 0.5
    assert silence.seconds == NOTICED_SECONDS + 0.5
    silence.answered()
    assert silence.seconds == 0


def test_the_oldest_question_counts(silence: Silence, clock: Clock) -> None:
    for _ in range(5):
        silence.asked()
        clock.now += 1
    assert silence.seconds == 5
    silence.heard()  # another connection works, and the question still waits
    assert silence.seconds == 0
    clock.now += 4
    assert silence.seconds == 4


def test_nothing_counts_as_silence_if_nobody_asks(silence: Silence, clock: Clock) -> None:
    clock.now += 1000
    silence.heard()
    assert (silence.seconds, silence.is_long) == (0, False)
    silence.admit()


def test_one_caller_a_second_probes_a_silent_server(silence: Silence, clock: Clock) -> None:
    silence.asked()
    clock.now += 6
    silence.admit()
    for _ in range(3):
        with pytest.raises(Silent):
            silence.admit()
    clock.now += PROBE_SECONDS
    silence.admit()
    silence.answered()
    for _ in range(3):
        silence.admit()


@pytest.mark.parametrize(
    ("seconds", "names", "keys", "expected"),
    [
        (0.0, 0.0, 0.0, (False, True)),
        (9.0, 10.0, 10.0, (True, True)),
        (11.0, 10.0, 10.0, (True, False)),
        (9.0, 10.0, 0.0, (True, False)),
        (9.0, 0.0, 10.0, (True, False)),
    ],
)
def test_an_outage_is_survived_as_long_as_names_and_keys_may_be_used(
    seconds: float, names: float, keys: float, expected: tuple[bool, bool]
) -> None:
    silence: Callable[[], float] = lambda: seconds  # noqa: E731
    outage = Outage(silence, names, keys)
    assert (outage.is_on, outage.is_survived) == expected
