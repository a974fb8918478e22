"""Tables of labelled texts, such as an export of tickets, as rows of decisions between the labels found."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.names import near
from server.cli.common import Document
from server.system.messages import plural

MAX_LABELS = 255
_SHOWN = 8  # columns or labels that a message lists


class TableError(Exception):
    """Raised for a table that can't be used. The message is for users."""


@dataclass(frozen=True)
class LabelledTexts:
    """The (text, label) pairs of a table, without duplicates, and notes for the user about what was left out."""

    pairs: Sequence[tuple[str, str]]
    notes: Sequence[str]

    def question(self, instructions: str) -> Document:
        """Return the choice between all labels. Raise TableError if there are too few or too many."""
        labels = sorted({label for _, label in self.pairs})
        if not 2 <= len(labels) <= MAX_LABELS:
            found = f": {labels[0]}" if len(labels) == 1 else ""
            message = f"has {plural(len(labels), 'label')}{found}, and a choice has 2 to {MAX_LABELS}"
            raise TableError(f"the label's column {message}")
        return {"type": "choice", "instructions": instructions, "choices": [{"value": one} for one in labels]}

    def write(self, path: Path) -> None:
        """Write the rows as JSONL."""
        lines = (json.dumps({"input": text, "answer": label}, ensure_ascii=False) for text, label in self.pairs)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_labelled(path: Path, text: str, label: str) -> LabelledTexts:
    """Read the columns `text` and `label` of a CSV file in UTF-8, with or without a byte order mark.

    Records without a text or a label and repeated records are left out, and counted in the notes. Raise TableError
    if the file or a column can't be used, or OSError if the file can't be read.
    """
    if path.suffix.lower() in {".json", ".jsonl"}:
        raise TableError("--text and --label are only for CSV files: leave them out")
    seen: dict[tuple[str, str], None] = {}
    num_unlabelled = num_empty = num_repeated = 0
    for record in _records(path, text, label):
        pair = record[0].strip(), record[1].strip()
        if not pair[1]:
            num_unlabelled += 1
        elif not pair[0]:
            num_empty += 1
        elif pair in seen:
            num_repeated += 1
        else:
            seen[pair] = None
    if not seen:
        raise TableError(f"no record has both a {text} and a {label}")
    counts = Counter(label for _, label in seen)
    texts = Counter(text for text, _ in seen)
    folded = Counter(label.casefold() for label in counts)
    notes = {
        f"without a {label} left out": num_unlabelled,
        f"without a {text} left out": num_empty,
        "left out that repeat another": num_repeated,
    }
    found = [f"{plural(num, 'record')} {note}" for note, num in notes.items() if num]
    if num := sum(count > 1 for count in texts.values()):
        have = "has" if num == 1 else "have"
        found.append(f"{plural(num, 'text')} {have} several labels: a classifier can't learn which is right")
    if rare := sorted(label for label, num in counts.items() if num == 1):
        found.append(f"labels that occur once are hardly learnt: {_listed(rare)}")
    if alike := sorted(label for label in counts if folded[label.casefold()] > 1):
        found.append(f"labels that differ only in case count as different: {_listed(alike)}")
    return LabelledTexts(list(seen), found)


def _records(path: Path, text: str, label: str) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            places = [_place(names, name) for name in (text, label)]
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(names):
                    found = f"has {plural(len(fields), 'column')}, and the first line {len(names)}"
                    raise TableError(f"the record that ends in line {reader.line_num} {found}")
                yield fields[places[0]], fields[places[1]]
        except csv.Error as error:
            raise TableError(f"line {reader.line_num} is not CSV: {error}") from None
        except UnicodeDecodeError:
            raise TableError("it is not UTF-8: save it as CSV UTF-8") from None


def _place(names: Sequence[str], name: str) -> int:
    if names.count(name) == 1:
        return names.index(name)
    if name in names:
        raise TableError(f"the first line names the column {name} twice")
    meant = near(name, names)
    hint = f": did you mean {meant}?" if meant else f"; the columns are {_listed(names)}"
    raise TableError(f"there is no column {name}{hint}")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
