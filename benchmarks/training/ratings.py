"""Sentences rated by people, from the source distribution of the PyPI package vaderSentiment.

It has four sets (Hutto & Gilbert 2014, ICWSM): tweets, and sentences of movie reviews, product reviews and
newspaper editorials, each rated by twenty people or more from -4 to 4. A sentence is positive from .5 up and
negative from -.5 down. Sentences in between and duplicates are left out. Products and news come from a few hundred
documents, which are split whole: neighbouring sentences would leak into the test.
"""

import csv
import hashlib
import importlib.util
import io
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

PACKAGE = "vaderSentiment"
VERSION = "3.3.2"
NESTED = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
}
LEAST_RATING = 0.5
TEST_SHARE = 0.3


@dataclass(frozen=True)
class Rated:
    """A sentence, and whether people rated it positive."""

    text: str
    is_positive: bool


@dataclass(frozen=True)
class RatingSet:
    """The split of a set. `tuning` is taken from the training half, for choosing a learning rate."""

    name: str
    train: tuple[Rated, ...]
    tuning: tuple[Rated, ...]
    test: tuple[Rated, ...]


class RuleClassifier(Protocol):
    """The rule classifier of the package."""

    def polarity_scores(self, text: str) -> dict[str, float]: ...


def source_directory(cache: Path, say: Callable[[str], None]) -> Path:
    """Return the unpacked source distribution under `cache`; downloaded with pip if missing."""
    directory = cache / f"{PACKAGE}-{VERSION}"
    if not directory.is_dir():
        say(f"downloading the source of {PACKAGE} {VERSION}")
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", ":all:", "--dest", str(cache), f"{PACKAGE}=={VERSION}"]
        subprocess.run(command, check=True)
        unfinished = cache / "unfinished"
        with tarfile.open(cache / f"{PACKAGE}-{VERSION}.tar.gz") as archive:
            archive.extractall(unfinished, filter="data")
        (unfinished / directory.name).rename(directory)
    return directory


def read_sets(source: Path, *, num_train: int, num_tuning: int, num_test: int, seed: int = 0) -> list[RatingSet]:
    """Read all four sets, each with at most these numbers of sentences, sampled deterministically."""
    with tarfile.open(source / NESTED) as archive:
        texts = {
            Path(member.name).name: cast("io.BufferedReader", archive.extractfile(member)).read()
            for member in archive
            if member.isfile()
        }
    return [
        _split(name, list(_parse(texts[file].decode("utf-8", "replace"))), num_train, num_tuning, num_test, seed)
        for name, file in FILES.items()
    ]


def rule_classifier(source: Path) -> RuleClassifier:
    """Load the package's classifier from its source, which has no dependencies."""
    spec = importlib.util.spec_from_file_location("vader_rules", source / PACKAGE / f"{PACKAGE}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("RuleClassifier", module.SentimentIntensityAnalyzer())


def _parse(text: str) -> Iterator[tuple[str, Rated]]:
    """Yield (document, sentence) of each clear rating, without duplicates."""
    seen: set[str] = set()
    for line in csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
        if len(line) != 3:
            continue
        identifier, rating, sentence = line[0], float(line[1]), " ".join(line[2].split())
        key = sentence.casefold()
        if abs(rating) >= LEAST_RATING and key and key not in seen:
            seen.add(key)
            yield identifier.partition("_")[0], Rated(sentence, rating > 0)


def _split(
    name: str, found: Sequence[tuple[str, Rated]], num_train: int, num_tuning: int, num_test: int, seed: int
) -> RatingSet:
    """Split by document. A tweet or a movie sentence is a document of its own."""
    train: list[Rated] = []
    test: list[Rated] = []
    for document, sentence in found:
        digest = hashlib.sha256(f"{name}/{document}".encode()).digest()
        (test if digest[0] < 256 * TEST_SHARE else train).append(sentence)
    shuffle = random.Random(f"{name}/{seed}").shuffle
    shuffle(train)
    shuffle(test)
    chosen = train[: num_train + num_tuning]
    return RatingSet(name, tuple(chosen[num_tuning:]), tuple(chosen[:num_tuning]), tuple(test[:num_test]))
