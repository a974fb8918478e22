"""Counts in sentences."""


def counted(number: int, noun: str) -> str:
    """As in `1 version`, `2 versions`, `1,000 rows`: for nouns whose plural ends in an s alone."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
