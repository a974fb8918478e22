"""Counts in sentences."""

from server.system.program import counted


def test_one_and_many() -> None:
    found = [counted(number, "stored adapter") for number in (0, 1, 2, 1000)]
    assert found == ["0 stored adapters", "1 stored adapter", "2 stored adapters", "1,000 stored adapters"]
