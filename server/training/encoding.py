"""Training rows as tokens: which tokens are trained on, and many rows in compact form, in memory and in a file.

    prompt, completion   encoded separately, the prompt as /generate does; trained on: completion and end token
    messages             encoded by the base's chat template; trained on: each of the assistant's texts and its end
                         token, but no headers and no turns of weight 0
    text                 trained on: all of it, and the end token
    input, answer        the prompt and the option that /decide would score; trained on: the option and end token

Rows longer than `max_length` are cut at the end, split, dropped or refused, as the job's `overlong` says. Text
that looks like a special token is treated as plain text. The first token of a row is never trained on, since
nothing precedes it.
"""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import astuple, dataclass
from itertools import compress, islice
from pathlib import Path
from statistics import median
from typing import Literal, Self, overload

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from adapters.errors import FieldError, InvalidInput
from adapters.storage.durable import new_file
from server.decisions.prompts import DecisionEncoder, prompt_text
from server.decisions.questions import Question
from server.model.text.chat import PromptEncoder
from server.system.messages import plural
from server.training.rows import MAX_NAMED, DecisionRow, MessagesRow, Row, TextRow, canonical_json, question_of
from server.training.spec import Overlong

MAX_TOKENS = 1 << 26
"""The most tokens that all rows of a job may have together. They take 320 MiB of memory."""
MAX_FAULTS = 20
"""The most faults that are reported."""
MAX_REFERENCES = 200
MAX_REFERENCE_TOKENS = 1 << 16
"""The most tokens of held-out rows whose completions are asked for, of each version that a job measures."""
MAX_ASKED_TOKENS = 1 << 17
"""About the most tokens of held-out decisions to which a job fits temperatures."""
FACT_TOKENS = 16
"""The largest median length of completions, in tokens, of rows that count as facts."""
FACT_SHARE = 0.9
"""The least share of facts that are distinct."""
MAX_TRAINED_REFERENCE_TOKENS = 1 << 14
"""About the most tokens of rows that a job is asked to recall, so that asking takes seconds."""
MAX_SAMPLES = 3
MAX_SAMPLE_CHARACTERS = 4000
"""The most characters of a sample's prompt and its row's answer together."""
_SPELLED = "{} in {} is encoded as plain text: rows get their end token anyway, and chats are rows of messages"


@dataclass(frozen=True)
class Example:
    """One row's tokens. If is_target[i], token i is trained on, given the tokens before it; token 0 never is."""

    token_ids: tuple[int, ...]
    is_target: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.is_target), "a flag for each token"
        assert not any(self.is_target[:1]), "nothing predicts the first token"


class Examples(Sequence[Example]):
    """Many examples, stored in 5 bytes a token. Each `Example` is created on access.

    `save` writes a safetensors file with four flat tensors. `token_ids` (int32) and `is_target` (uint8) have an
    entry for each token. `offsets` (int64) has the start of each example, and the end of the last one. `sources`
    (int64) has the number of each example's row. Several examples have the same row if that was split.
    """

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._token_ids = array("i")
        self._is_target = array("B")
        self._offsets = array("q", [0])
        self._sources = array("q")
        for number, example in enumerate(examples):
            self.append(example, number)

    def append(self, example: Example, source: int) -> None:
        """Append an example. `source` is the number of the row that it comes from."""
        self._sources.append(source)
        self._token_ids.extend(example.token_ids)
        self._is_target.extend(example.is_target)
        self._offsets.append(len(self._token_ids))

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return [end - start for start, end in zip(self._offsets, self._offsets[1:], strict=False)]

    @property
    def sources(self) -> Sequence[int]:
        """The number of each example's row."""
        return self._sources

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def num_targets(self) -> int:
        """The number of tokens that are trained on."""
        # array's own `count` creates an int for each item, and holds the GIL meanwhile
        return int(np.count_nonzero(np.asarray(self._is_target).view(np.bool_)))

    def row_keys(self) -> list[int]:
        """Return a hash of each example's whole row. Windows of a row have the same one, and so do equal rows."""
        rows: dict[int, list[int]] = {}
        for source, example in zip(self._sources, self, strict=True):
            rows.setdefault(source, []).append(hash(example))
        keys = {source: hash(tuple(hashes)) for source, hashes in rows.items()}
        return [keys[source] for source in self._sources]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # raises IndexError
        span = slice(self._offsets[place], self._offsets[place + 1])
        return Example(tuple(self._token_ids[span]), tuple(map(bool, self._is_target[span])))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def save(self, path: Path) -> None:
        """Write the file, completely or not at all. Raise OSError if that fails."""
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "token_ids": np.array(self._token_ids, np.int32),
            "is_target": np.array(self._is_target, np.uint8),
            "offsets": np.array(self._offsets, np.int64),
            "sources": np.array(self._sources, np.int64),
        }
        with new_file(path) as unfinished:
            save_file(tensors, unfinished)

    @classmethod
    def load(cls, path: Path) -> "Examples":
        """Read what `save` wrote. Raise OSError, or SafetensorError if the file is damaged."""
        tensors = load_file(path)
        examples = cls()
        examples._token_ids = array("i", tensors["token_ids"].tobytes())
        examples._is_target = array("B", tensors["is_target"].tobytes())
        examples._offsets = array("q", tensors["offsets"].tobytes())
        sources = tensors.get("sources", np.arange(len(examples)))  # missing in an older release's files
        examples._sources = array("q", sources.tobytes())
        return examples


@dataclass(frozen=True)
class Reference:
    """A prompt, and the text that the prompt's greedy completion is compared with."""

    prompt: tuple[int, ...]
    text: str
    num_tokens: int  # of `text`

    @property
    def length(self) -> int:
        """The number of tokens of prompt and text."""
        return len(self.prompt) + self.num_tokens


@dataclass(frozen=True)
class Sample:
    """A held-out row whose prompt is answered at each evaluation, to show what an adapter has learned so far.

    `prompt` is the prompt's text: of a chat, the last turn before the answer.
    """

    prompt: str
    reference: Reference


@dataclass(frozen=True)
class Asked:
    """A held-out decision as tokens: its prompt, its question's digest, and the index of the right option."""

    prompt: tuple[int, ...]
    question: str
    answer: int


@dataclass(frozen=True)
class LongRows:
    """Counts of the rows that are longer than `max_length`, by what happened to them."""

    num_truncated: int = 0
    num_cut_tokens: int = 0  # from the ends of truncated rows
    num_dropped: int = 0
    num_dropped_tokens: int = 0
    num_split: int = 0
    num_windows: int = 0  # that split rows became

    @property
    def num_lost_tokens(self) -> int:
        return self.num_cut_tokens + self.num_dropped_tokens

    def scaled(self, factor: float) -> Self:
        """Return the counts times `factor`."""
        return type(self)(*(round(factor * count) for count in astuple(self)))

    def __add__(self, other: Self) -> Self:
        return type(self)(*map(sum, zip(astuple(self), astuple(other), strict=True)))

    def warnings(self, max_length: int, name: str = "training.max_length") -> list[str]:
        """Return a warning for each kind of long rows that occurs. `name` is the limit's, for the text."""
        limit = f"{name} ({plural(max_length, 'token')})"
        counts = {
            f"cut at {limit}: {plural(self.num_cut_tokens, 'token')} lost": self.num_truncated,
            f"dropped as too long for {limit}: {plural(self.num_dropped_tokens, 'token')} lost": self.num_dropped,
            f"longer than {limit} split into {plural(self.num_windows, 'window')}; each counts as a row": (
                self.num_split
            ),
        }
        return [f"{plural(count, 'row')} {what}" for what, count in counts.items() if count]


@dataclass(frozen=True)
class EncodedRows:
    """All rows of a job, in their order, and warnings about likely mistakes in them.

    A split row has an example for each window, and a dropped row has none. `are_facts` is true if each row has a
    completion, completions are short, and nearly all are distinct.
    """

    examples: Examples
    long: LongRows
    are_facts: bool
    warnings: tuple[str, ...]


class RowEncoder:
    """Encodes rows for one base. Safe to call from several threads at once."""

    def __init__(self, encoder: PromptEncoder, eos_token_id: int, end_token_ids: Collection[int] = ()) -> None:
        """Use `eos_token_id` as the end token of rows. Any of `end_token_ids` may end an assistant's turn, too."""
        self.decisions = DecisionEncoder(encoder, eos_token_id)
        self._encoder = encoder
        self._eos = eos_token_id
        self._ends = frozenset({eos_token_id, *end_token_ids})
        self._questions: Mapping[str, Question] = {}
        self._shuffled_by: int | None = None

    def asking(self, questions: Mapping[str, Question], shuffled_by: int | None = None) -> Self:
        """Return an encoder of decisions that name these questions.

        If `shuffled_by` is a seed, prompts list the options of choices in an order that depends on the seed and
        the row. Otherwise the order is the question's, as in /decide.
        """
        asking = copy(self)
        asking._questions = questions
        asking._shuffled_by = shuffled_by
        return asking

    def encode(self, row: Row, max_length: int, overlong: Literal["truncate", "refuse"] = "truncate") -> Example:
        """Encode the row in at most `max_length` tokens.

        Raise InvalidInput, which names the row's field, if the row is longer and `overlong` is "refuse", if
        nothing is left to train on, or if the base's chat template rejects the messages.
        """
        return self._fitted(row, max_length, overlong)[0][0]

    def encode_all(
        self,
        rows: Iterable[Row],
        max_length: int,
        overlong: Overlong = "truncate",
        loc: tuple[str | int, ...] = ("data",),
    ) -> EncodedRows:
        """Encode all rows. Raise InvalidInput if rows have faults.

        The location of a fault is (*loc, row, field), and rows are counted from 0.
        """
        examples = Examples()
        long = LongRows()
        completions = _Completions()
        spelled = Counter[str]()
        faults: list[FieldError] = []
        for number, row in enumerate(rows):
            try:
                fitted, too_long = self._fitted(row, max_length, overlong)
            except InvalidInput as error:
                faults += [FieldError((*loc, number, *fault.loc), fault.message) for fault in error.errors]
                if len(faults) >= MAX_FAULTS:
                    break
                continue
            for example in fitted:
                examples.append(example, number)
                completions.add(example, row)
            if too_long is not None:
                long += too_long
            spelled.update({name for text in texts_of(row) if (name := self._encoder.spelled(text, self._ends))})
            if examples.num_tokens > MAX_TOKENS:
                raise InvalidInput([FieldError(loc, f"has more than {MAX_TOKENS} tokens")])
        if faults:
            raise InvalidInput(faults[:MAX_FAULTS])
        warnings = [_SPELLED.format(name, plural(number, "row")) for name, number in spelled.items()]
        return EncodedRows(examples, long, completions.are_facts, tuple(warnings))

    def reference(self, row: Row) -> Reference | None:
        """Return a row's completion, or its last trained turn, with its prompt. Return None for a `TextRow`.

        A decision's completion is its answer's text.
        """
        if isinstance(row, DecisionRow):
            prompt, text = self._decision(row)
            return Reference(prompt, text, len(self.decisions.option(text)) - 1)
        if (asked := question_of(row)) is None:
            return None
        question, text = asked
        ids = self._encoder.prompt(question) if isinstance(question, str) else self._encoder.messages(question)
        return Reference(tuple(ids), text, len(self._encoder.continuation(text)))

    def references(
        self, rows: Iterable[Row], limit: int = MAX_REFERENCES, max_length: int | None = None
    ) -> list[Reference]:
        """Return `reference(row)` for the first `limit` rows that have a prompt.

        Return fewer if all together would have more than `MAX_REFERENCE_TOKENS` tokens. Rows longer than
        `max_length` are left out, as in `trained_references`.
        """
        found: list[Reference] = []
        num_tokens = 0
        for one in map(self.reference, rows):
            if one is None or (max_length is not None and one.length >= max_length):
                continue
            num_tokens += one.length
            if found and num_tokens > MAX_REFERENCE_TOKENS:
                break
            found.append(one)
            if len(found) == limit:
                break
        return found

    def samples(self, rows: Iterable[Row], max_length: int) -> list[Sample]:
        """Return up to `MAX_SAMPLES` of the first `MAX_REFERENCES` rows, with different prompts.

        Rows are left out if they have no prompt, are longer than `max_length` or `MAX_SAMPLE_CHARACTERS`, or
        contain NUL characters.
        """
        found: dict[str, Sample] = {}
        for row in islice(rows, MAX_REFERENCES):
            prompt = self._prompt_text(row)
            if not prompt or prompt in found or "\0" in prompt or len(prompt) > MAX_SAMPLE_CHARACTERS:
                continue
            reference = self.reference(row)
            assert reference is not None, "the row has a prompt"
            is_short = len(prompt) + len(reference.text) <= MAX_SAMPLE_CHARACTERS
            if is_short and reference.length < max_length and "\0" not in reference.text:
                found[prompt] = Sample(prompt, reference)
            if len(found) == MAX_SAMPLES:
                break
        return list(found.values())

    def asked(self, rows: Iterable[Row]) -> list[Asked]:
        """Return the decisions among the rows, up to about `MAX_ASKED_TOKENS` tokens."""
        found: list[Asked] = []
        num_tokens = 0
        for row in rows:
            if isinstance(row, DecisionRow) and num_tokens < MAX_ASKED_TOKENS:
                question = self.question(row)
                prompt = self.decisions.prompt(row.input, question)
                num_tokens += len(prompt)
                found.append(Asked(prompt, question.digest, question.index_of(row.answer)))
        return found

    def trained_references(self, rows: Sequence[Row], num_tokens: int, max_length: int) -> list[Reference]:
        """Return `reference(row)` for up to `MAX_REFERENCES` training rows, spread evenly over `rows`.

        All rows together have `num_tokens`. Rows longer than `max_length` are left out, since their ends aren't
        trained on.
        """
        most = MAX_TRAINED_REFERENCE_TOKENS * len(rows) // max(num_tokens, 1)
        count = min(len(rows), max(most, 1), MAX_REFERENCES)
        found = (self.reference(rows[number * len(rows) // count]) for number in range(count))
        return [one for one in found if one is not None and one.length < max_length]

    def _fitted(self, row: Row, max_length: int, overlong: Overlong) -> tuple[list[Example], LongRows | None]:
        """Return the row's examples, each of at most `max_length` tokens.

        If the row is longer, it is handled as `overlong` says. Also return counts of what was cut, dropped or
        split, or None if the row isn't longer.
        """
        token_ids, targets, field = self._whole(row)
        is_target = [False] * len(token_ids)
        for span in targets:
            kept = range(max(span.start, 1), span.stop)
            is_target[kept.start : kept.stop] = [True] * len(kept)
        num_tokens, num_cut = len(token_ids), len(token_ids) - max_length
        if num_cut > 0 and overlong == "refuse":
            raise InvalidInput.of(field, f"has {num_tokens} tokens, more than max_length {max_length}")
        dropped = LongRows(num_dropped=1, num_dropped_tokens=num_tokens)
        if num_cut > 0 and overlong == "drop":
            return [], dropped
        if num_cut > 0 and (overlong == "split" or (overlong == "auto" and isinstance(row, TextRow))):
            windows = _windows(token_ids, is_target, max_length)
            return windows, LongRows(num_split=1, num_windows=len(windows))
        if any(is_target[:max_length]):
            example = Example(tuple(token_ids[:max_length]), tuple(is_target[:max_length]))
            return [example], LongRows(num_truncated=1, num_cut_tokens=num_cut) if num_cut > 0 else None
        if num_cut > 0 and overlong == "auto":
            return [], dropped
        within = f"within max_length {max_length} of {num_tokens} tokens"
        raise InvalidInput.of(field, f"leaves nothing to train on {within}: raise max_length, or shorten the row")

    def _whole(self, row: Row) -> tuple[list[int], Sequence[range], str]:
        """Return (all tokens up to the last trained one, ranges of trained tokens, the field that errors name)."""
        if isinstance(row, MessagesRow):
            token_ids, turns = self._encoder.conversation(row.messages, self._ends)
            trained = (place not in row.untrained for place in row.assistant)
            turns = list(compress(turns, trained))
            last = turns[-1]
            del token_ids[last.stop :]
            if not last or token_ids[-1] not in self._ends:  # the template ends no turn
                token_ids.append(self._eos)
                turns[-1] = range(last.start, len(token_ids))
            return token_ids, turns, "messages"
        if isinstance(row, TextRow):
            token_ids = [*self._encoder.prompt(row.text), self._eos]
            return token_ids, [range(len(token_ids))], "text"
        if isinstance(row, DecisionRow):
            asked, text = self._decision(row)
            token_ids = [*asked, *self.decisions.option(text)]
            return token_ids, [range(len(asked), len(token_ids))], "input"
        prompt = self._encoder.prompt(row.prompt)
        token_ids = [*prompt, *self._encoder.continuation(row.completion), self._eos]
        return token_ids, [range(len(prompt), len(token_ids))], "completion"

    def question(self, row: DecisionRow) -> Question:
        """Return a decision's question. Raise InvalidInput, which names the row's field, if there is none."""
        if isinstance(row.question, Question):
            return row.question
        known = ", ".join(list(self._questions)[:MAX_NAMED]) or "none"
        if row.question is None:
            if len(self._questions) == 1:
                return next(iter(self._questions.values()))
            raise InvalidInput.of("question", f"is missing; the job's questions are: {known}")
        if row.question not in self._questions:
            raise InvalidInput.of("question", f"is no question of the job: {known}")
        return self._questions[row.question]

    def _prompt_text(self, row: Row) -> str | None:
        """Return the text of the row's prompt as `Sample` has it, or None if the row has no prompt."""
        if isinstance(row, DecisionRow):
            return prompt_text(row.input, self.question(row))
        if (asked := question_of(row)) is None:
            return None
        question, _ = asked
        if isinstance(question, str):
            return question
        return question[-1].content if question else None

    def _decision(self, row: DecisionRow) -> tuple[tuple[int, ...], str]:
        """Return a decision's prompt and the text of its answer."""
        question = self.question(row)
        text = question.options[question.index_of(row.answer)].text
        if self._shuffled_by is not None and question.type == "choice":
            order = list(range(len(question.options)))
            random.Random(f"{self._shuffled_by}".encode() + canonical_json(row)).shuffle(order)
            question = question.reordered(order)
        return self.decisions.prompt(row.input, question), text


class _Completions:
    """The lengths of rows' completions, and how many are distinct."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._distinct: set[int] = set()  # hashes
        self._num_texts = 0

    def add(self, example: Example, row: Row) -> None:
        self._num_texts += isinstance(row, TextRow)
        targets = tuple(compress(example.token_ids, example.is_target))
        self._lengths.append(len(targets) - 1)  # without the end token
        self._distinct.add(hash(targets))

    @property
    def are_facts(self) -> bool:
        if not self._lengths or self._num_texts:
            return False
        is_short = median(self._lengths) <= FACT_TOKENS
        return is_short and len(self._distinct) >= FACT_SHARE * len(self._lengths)


def _windows(token_ids: Sequence[int], is_target: Sequence[bool], max_length: int) -> list[Example]:
    """Split a row into windows of at most `max_length` tokens. `max_length` must be at least 2.

    A window begins with the last token of the window before, so that each target has a token before it. Windows
    without targets are left out.
    """
    windows = []
    for start in range(0, len(token_ids) - 1, max_length - 1):
        flags = (False, *is_target[start + 1 : start + max_length])
        if any(flags):
            windows.append(Example(tuple(token_ids[start : start + max_length]), flags))
    return windows


def texts_of(row: Row) -> Sequence[str]:
    """Return the row's texts, in their order."""
    if isinstance(row, MessagesRow):
        return [turn.content for turn in row.messages]
    if isinstance(row, DecisionRow):
        return [row.input, str(row.answer)]
    return [row.text] if isinstance(row, TextRow) else [row.prompt, row.completion]


def preview(example: Example, decode: Callable[[list[int]], str]) -> list[tuple[str, bool]]:
    """Return the tokens for display, in order: (text, whether it is trained on). Special tokens appear by name.

    `decode` is the tokenizer's. Tokens that are parts of one character are shown as one text.
    """
    shown: list[tuple[str, bool]] = []
    pending: list[int] = []
    for place, (token, is_target) in enumerate(zip(example.token_ids, example.is_target, strict=True)):
        pending.append(token)
        text = decode(pending)
        following = example.is_target[place + 1 : place + 2]
        is_alike = following == (is_target,) or (place == 0 and len(following) == 1)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and is_alike and len(pending) < 4:  # part of a character
            continue
        shown.append((text, is_target))
        pending = []
    return shown
