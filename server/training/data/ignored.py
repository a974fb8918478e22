"""Fields of rows that are not trained on: passed over, and counted, so that a warning can tell of them."""

from collections import Counter

from server.counted import counted

MAX_NAMED = 8
MAX_NAME = 64
"""Characters of a name that are given back: it is the client's own."""


class IgnoredFields:
    """How many rows had each field. Names beyond the first few are counted together."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._num_others = 0

    def add(self, name: str) -> None:
        """Count one row's field."""
        if name in self._rows or len(self._rows) < MAX_NAMED:
            self._rows[name] += 1
        else:
            self._num_others += 1

    def warnings(self) -> list[str]:
        """One line, or none."""
        told = [f"{shown(name)} in {counted(number, 'row')}" for name, number in self._rows.items()]
        if self._num_others:
            told.append(f"{self._num_others} times others")
        return [f"fields that are not trained on were ignored: {', '.join(told)}"] if told else []


def shown(name: str) -> str:
    """A field's name as it can be put into an answer; half a surrogate pair can't, and a column may have none."""
    return name[:MAX_NAME].encode("utf-8", "backslashreplace").decode() or "(no name)"
