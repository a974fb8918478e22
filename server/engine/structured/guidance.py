"""Structured output: grammars checked and compiled off the engine's thread, and followed by each sequence on it.

`Guidance.check` is for requests before they are taken: it has a grammar vetted in another process
(`grammar_check`), compiles it on a thread of low priority, and keeps it. `Guidance.constraint` puts a sequence at
its beginning. llguidance tells which tokens may come next; end tokens may where the answer could end. Where only
one text can follow, its longest token comes: that depends on the answer so far alone, and costs the same however
much there is to follow. What answers look like is `grammar`'s part.
"""

import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from adapters.errors import FieldError, InvalidInput
from server.engine.request import Grammar
from server.engine.structured.grammar import GrammarRefused, compiled
from server.engine.structured.grammar_check import GrammarChecker
from server.errors import QueueFull

_NUM_KEPT = 64  # compiled grammars
_TURN_SECONDS = 5.0  # what a grammar may wait for others
_NICE = 10
_MAX_SPLITS = 64
"""Tokens that the same text may begin with: more are a choice."""
_QUICK = 0.02
"""Seconds of the processor: what compiles faster may be compiled again on the engine's thread."""


@dataclass
class _Kept:
    """A compiled grammar that was vetted. Copies of its matcher share what they have learnt of it so far, which is
    limited: an answer that reaches the limit spoils it for all of them."""

    matcher: LLMatcher
    seconds: float  # of the processor, that compiling it took
    is_spoilt: bool = False


class Constraint:
    """Where one sequence is in its grammar. The engine's thread owns it."""

    def __init__(
        self, grammar: Grammar, kept: _Kept, compile_anew: Callable[[], LLMatcher], tokenizer: LLTokenizer
    ) -> None:
        self._grammar = grammar
        self._kept = kept
        self._compile_anew = compile_anew
        self._tokenizer = tokenizer
        self._matcher = kept.matcher.deep_copy()
        self._token_ids: list[int] = []
        self._allowed: NDArray[np.bool_] | None = None  # what may come next, once that was asked for
        self._forced: tuple[int, ...] = ()
        self._place = 0  # of the next one
        self._is_alone = False

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow any more."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> InvalidInput | None:
        """Why the grammar can't be followed any further."""
        if not self._matcher.is_error():
            return None
        return refusal(self._grammar, "became too complex to follow: make it simpler")

    def forbidden(self) -> NDArray[np.bool_] | None:
        """(vocab,) True for tokens that may not come next; None where there is an error."""
        if forced := self.forced(1):
            but_one = np.ones(self._tokenizer.vocab_size, np.bool_)
            but_one[forced[0]] = False
            return but_one
        allowed = self._asked()
        return None if allowed is None else ~allowed

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        """Up to so many of the tokens that come next because each is the only one that may; none where there is a
        choice."""
        if self._place == len(self._forced):
            self._forced, self._place = tuple(self._foreseen(max_tokens)), 0
        return self._forced[self._place : self._place + max_tokens]

    def accept(self, token_id: int) -> None:
        """Move on by a token that isn't forbidden and doesn't end the answer."""
        self._token_ids.append(token_id)
        self._matcher.consume_token(token_id)
        self._follow(token_id)
        if self._matcher.is_error():
            self._go_on_alone()

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other."""
        return self._matcher.deep_copy().validate_tokens(list(token_ids))  # which may fail, as the copy then has

    def after(self, token_ids: Sequence[int]) -> "Constraint":
        """A copy that has moved on by these tokens, all of which may come next."""
        kept = _Kept(self._matcher, self._kept.seconds)
        copy = Constraint(self._grammar, kept, self._compile_anew, self._tokenizer)
        copy._is_alone = True  # where it can't be followed, the original decides
        copy._allowed, copy._forced, copy._place = self._allowed, self._forced, self._place
        copy._matcher.consume_tokens(list(token_ids))
        for token_id in token_ids:
            copy._follow(token_id)
        return copy

    def _follow(self, token_id: int) -> None:
        """The matcher has moved on by the token, which may be what was forced."""
        self._allowed = None
        if self._forced[self._place : self._place + 1] == (token_id,):
            self._place += 1
        else:
            self._forced, self._place = (), 0

    def _foreseen(self, max_tokens: int) -> Iterator[int]:
        """What is forced, looked up token by token."""
        if self.is_complete or (token_id := self._only(self._matcher, self._asked())) is None:
            return
        yield token_id
        ahead = self._matcher.deep_copy()
        for _ in range(max_tokens - 1):
            ahead.consume_token(token_id)
            if ahead.is_stopped() or (token_id := self._only(ahead, _allowed(ahead))) is None:
                return
            yield token_id

    def _only(self, matcher: LLMatcher, allowed: NDArray[np.bool_] | None) -> int | None:
        """The longest of the tokens `allowed` where its text is all that may follow; None where there is a choice,
        or nothing.

        Tokens that are all splits of one text don't say so: it may end, or go on otherwise, behind a shorter one
        ("low" and "lower"). What follows begins with the shortest of them in any case.
        """
        splits = self._splits(allowed)
        if not splits:
            return None
        (rest, longest), ahead = splits[-1], matcher
        while rest := rest[len(splits[0][0]) :]:
            ahead = ahead.deep_copy() if ahead is matcher else ahead
            ahead.consume_token(splits[0][1])
            splits = [] if ahead.is_stopped() else self._splits(_allowed(ahead), rest)
            if not splits:
                return None
        return longest

    def _splits(self, allowed: NDArray[np.bool_] | None, text: bytes = b"") -> Sequence[tuple[bytes, int]]:
        """The tokens `allowed` with their texts, the shortest first, where all begin, or go on, the same `text`;
        none otherwise, or where the answer may end."""
        if allowed is None or np.count_nonzero(allowed) > _MAX_SPLITS:
            return []
        token_ids = allowed.nonzero()[0].tolist()
        splits = sorted((self._tokenizer.decode_bytes([token_id]), token_id) for token_id in token_ids)
        longest = max([text, *(split for split, _ in splits)], key=len)
        are_one = all(split and longest.startswith(split) for split, _ in splits)
        return splits if are_one and not set(token_ids) & set(self._tokenizer.eos_tokens) else []

    def _asked(self) -> NDArray[np.bool_] | None:
        """(vocab,) True for tokens that the matcher lets come next; None where there is an error."""
        if self._allowed is None:
            self._allowed = _allowed(self._matcher)
            if self._allowed is None:
                self._go_on_alone()
                self._allowed = _allowed(self._matcher)
        return self._allowed

    def _go_on_alone(self) -> None:
        """Follow the answer anew with a matcher that nobody shares: the limit may have been reached by others."""
        self._kept.is_spoilt = True
        if not self._is_alone and self._kept.seconds < _QUICK:
            self._is_alone = True
            self._matcher = self._compile_anew()
            self._matcher.consume_tokens(self._token_ids)


def _allowed(matcher: LLMatcher) -> NDArray[np.bool_] | None:
    mask = matcher.compute_logit_bias()
    return None if matcher.is_error() else np.frombuffer(mask, dtype=np.uint8) != 0


class Guidance:
    """The grammars of one tokenizer."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`tokenizer`: the text of a Hugging Face tokenizer.json; `vocab_size`: the width of the logits."""
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._checker = GrammarChecker(tokenizer, vocab_size, eos_token_ids)
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler", _step_back)
        self._turn = threading.Lock()  # of who is having a grammar checked
        self._lock = threading.Lock()  # of what is kept
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, _Kept] = OrderedDict()  # the one used last comes last

    def start(self) -> None:
        """Prepare, in the background, what the first grammar would wait for."""
        self._compiler.submit(self._ready_tokenizer)
        # Not on the compiler's thread: what a thread starts inherits its priority.
        threading.Thread(target=self._checker.start, name="grammar-check", daemon=True).start()

    def close(self) -> None:
        """End the other process and the thread."""
        self._checker.close()
        self._compiler.shutdown(wait=True, cancel_futures=True)

    def check(self, grammar: Grammar) -> None:
        """Vet and compile, which may block for a second or two (longer on a machine that is too busy for it), and
        for those before it. Safe in any thread.

        Raises InvalidInput on the grammar's field, or TryAgain.
        """
        if self.is_usable(grammar):
            return
        if not self._turn.acquire(timeout=_TURN_SECONDS):
            raise QueueFull("too many grammars wait to be compiled")
        try:
            if not self.holds(grammar):
                self._checker.check(grammar)
            if not self.is_usable(grammar):
                self._compiler.submit(self._keep, grammar).result()
        except GrammarRefused as error:
            raise refusal(grammar, str(error)) from None
        finally:
            self._turn.release()

    def holds(self, grammar: Grammar) -> bool:
        """Whether the grammar was checked lately."""
        return self._find(grammar) is not None

    def constraint(self, grammar: Grammar) -> Constraint:
        """A new sequence's, of a grammar that `check` has passed."""
        kept = self._find(grammar) or self._keep(grammar)  # it may have had to make room since
        return Constraint(grammar, kept, partial(self._compile, grammar), self._ready_tokenizer())

    def is_usable(self, grammar: Grammar) -> bool:
        """Whether `check` has nothing to do for it. At once, in any thread."""
        kept = self._find(grammar)
        return kept is not None and not kept.is_spoilt

    def _find(self, grammar: Grammar) -> _Kept | None:
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
            return kept

    def _keep(self, grammar: Grammar) -> _Kept:
        begun = time.thread_time()
        matcher = self._compile(grammar)
        kept = _Kept(matcher, time.thread_time() - begun)
        with self._lock:
            self._kept[grammar] = kept
            self._kept.move_to_end(grammar)
            if len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
        return kept

    def _compile(self, grammar: Grammar) -> LLMatcher:
        return compiled(self._ready_tokenizer(), grammar)

    def _ready_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._source, n_vocab=self._vocab_size, eos_token=self._eos)
        return self._tokenizer


def refusal(grammar: Grammar, message: str) -> InvalidInput:
    """The grammar's fault, on the field that it came in."""
    loc = ("regex",) if grammar.kind == "regex" else ("response_format", "json_schema", "schema")
    return InvalidInput([FieldError(loc, message)])


def _step_back() -> None:
    """Give this thread a low priority, where threads can have their own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
