"""Structured output: check and compile grammars, and constrain sequences to them.

`Guidance.check` runs before a request is accepted. It vets a grammar in another process (`grammar_check`),
compiles it on a thread of low priority, and caches it. `Guidance.constraint` creates a sequence's `Constraint`.
llguidance's mask says which tokens may come next. End tokens are allowed if the answer may end at this point.
If only one text can follow, the longest token that this text begins with is forced. Which token is forced depends
only on the answer so far, and finding the token takes no longer if the text is long. `masks` decides when and on
which thread a mask is computed. `grammar` decides which grammars are supported.

All copies of an llguidance matcher share one mutex, and some of llguidance's functions run with the GIL held. So
all matchers of a grammar belong to one thread at a time: the engine's thread, or the thread of `masks` while
`Constraint.awaits_mask` is set.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from adapters.errors import FieldError, InvalidInput
from server.config.environment import without_secrets
from server.engine.grammar import GrammarRefused, compiled
from server.engine.grammar_check import GrammarChecker
from server.engine.request import Grammar
from server.errors import QueueFull
from server.system.threads import step_back

_NUM_KEPT = 64  # compiled grammars in the cache
_TURN_SECONDS = 5.0  # maximum wait for other grammars' checks
_MAX_SPLITS = 64
"""Forced tokens are looked for only if at most this many tokens are allowed."""
_QUICK = 0.02
"""A grammar that compiled in fewer processor seconds may be compiled again during an answer."""
_RECENT = 0.1
"""Weight of the latest mask in the running mean of a grammar's mask time."""

Mask = NDArray[np.bool_]
"""(vocab,) True for tokens that may come next."""


@dataclass(eq=False)
class Compiled:
    """A vetted and compiled grammar.

    Copies of its matcher share lexer states, whose number is limited. If one answer reaches the limit, all copies
    become unusable (`is_spoilt`).
    """

    matcher: LLMatcher
    seconds: float  # processor time that compiling took
    first_mask: Mask | None
    mask_seconds: float = 0.0  # running mean of the processor time of a mask
    num_pending: int = 0  # masks that the thread of `masks` still has to compute
    is_spoilt: bool = False

    def observe(self, seconds: float) -> None:
        """Add the processor time of one mask to the running mean."""
        self.mask_seconds += _RECENT * (seconds - self.mask_seconds)


class Constraint:
    """The state of one sequence in its grammar. One thread at a time may use it (see the module's docstring)."""

    def __init__(
        self,
        grammar: Grammar,
        compiled: Compiled,
        compile_again: Callable[[], LLMatcher],
        tokenizer: LLTokenizer,
        matcher: LLMatcher | None = None,
    ) -> None:
        """Start at the answer's beginning, or in the state of `matcher` if it is given."""
        self.compiled = compiled
        self.spare_seconds = math.inf  # budget for masks of drafts in the next step
        self._grammar = grammar
        self._compile_again = compile_again
        self._tokenizer = tokenizer
        self._matcher = (matcher or compiled.matcher).deep_copy()
        self._token_ids: list[int] = []
        self._mask = None if matcher else compiled.first_mask
        self._is_asked = self._mask is not None  # whether the mask was computed; after an error `_mask` is None
        self._forced: tuple[int, ...] | None = None  # None: not computed yet
        self._is_alone = False  # whether its matcher can't be replaced by a newly compiled one
        self._has_failed = False

    @property
    def awaits_mask(self) -> bool:
        """Whether another thread computes masks of this grammar.

        If so, don't use any other attribute or method of the constraint.
        """
        return self.compiled.num_pending > 0

    @property
    def matcher(self) -> LLMatcher:
        """The matcher that computes the next mask."""
        return self._matcher

    @property
    def lacks_mask(self) -> bool:
        """Whether the next token can't be drawn before a mask is computed."""
        return not (self._is_asked or self._forced)

    @property
    def max_draft(self) -> int:
        """The maximum length of a draft in this step, limited by the time that its tokens' masks take."""
        return int(min(self.spare_seconds / max(self.compiled.mask_seconds, 1e-6), 1000))

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete, so that no token can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> InvalidInput | None:
        """The error if the answer can't follow the grammar any further, else None."""
        if not (self._has_failed or self._matcher.is_error()):
            return None
        return refusal(self._grammar, "became too complex to follow: make it simpler")

    def forbidden(self) -> NDArray[np.bool_] | None:
        """Return a mask (vocab,) that is True for tokens that may not come next, or None if there is an error."""
        if forced := self.forced(1):
            but_one = np.ones(self._tokenizer.vocab_size, np.bool_)
            but_one[forced[0]] = False
            return but_one
        allowed = self._asked()
        return None if allowed is None else ~allowed

    def forced(self, max_tokens: int) -> tuple[int, ...]:
        """Return up to `max_tokens` next tokens that the grammar forces."""
        if self._forced is None:
            self._forced = tuple(self._foreseen(max_tokens))
        return self._forced[:max_tokens]

    def compute_mask(self) -> bool:
        """Compute the next mask on this thread.

        Return False if that failed and the caller must call `receive(None)`, which tries again; else True.
        """
        begun = time.thread_time()
        mask = mask_of(self._matcher, self._tokenizer.vocab_size)
        self.compiled.observe(time.thread_time() - begun)
        if mask is None and self._may_restart:
            return False
        self._mask, self._is_asked = mask, True
        return True

    def receive(self, mask: Mask | None) -> None:
        """Set the next mask, and compute the forced tokens.

        `mask` is None if computing it has failed. In that case, retry with a newly compiled matcher if compiling
        is quick.
        """
        if mask is None:
            self._restart()
            mask = mask_of(self._matcher, self._tokenizer.vocab_size)
        self._mask, self._is_asked = mask, True
        self.forced(1)

    def give_up(self) -> None:
        """Mark the constraint as failed, which sets `error`."""
        self._mask, self._is_asked, self._forced, self._has_failed = None, True, (), True

    def accept(self, token_id: int) -> None:
        """Advance by a token that isn't forbidden and doesn't end the answer."""
        self._token_ids.append(token_id)
        self._matcher.consume_token(token_id)
        self._follow(token_id)
        if self._matcher.is_error():
            self._restart()

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of these tokens, from the first on, the grammar allows in this order."""
        return self._matcher.deep_copy().validate_tokens(list(token_ids))  # an error affects only the copy

    def after(self, token_ids: Sequence[int]) -> "Constraint":
        """Return a copy that has advanced by these tokens, which must be allowed."""
        copy = Constraint(self._grammar, self.compiled, self._compile_again, self._tokenizer, self._matcher)
        copy._is_alone = True  # only the original may compile the grammar again
        copy._mask, copy._is_asked, copy._forced = self._mask, self._is_asked, self._forced
        copy._matcher.consume_tokens(list(token_ids))
        for token_id in token_ids:
            copy._follow(token_id)
        return copy

    def _follow(self, token_id: int) -> None:
        """Drop the mask. Drop the forced tokens, too, unless the consumed `token_id` was the first of them."""
        self._mask, self._is_asked = None, False
        is_foreseen = self._forced is not None and self._forced[:1] == (token_id,)
        self._forced = (self._forced[1:] or None) if self._forced and is_foreseen else None

    def _foreseen(self, max_tokens: int) -> Iterator[int]:
        """Yield up to `max_tokens` forced tokens."""
        if self.is_complete or (token_id := self._only(self._matcher, self._asked())) is None:
            return
        yield token_id
        ahead = self._matcher.deep_copy()
        for _ in range(max_tokens - 1):
            ahead.consume_token(token_id)
            if ahead.is_stopped() or (token_id := self._only(ahead, self._mask_of(ahead))) is None:
                return
            yield token_id

    def _only(self, matcher: LLMatcher, allowed: Mask | None) -> int | None:
        """Return the longest token of `allowed` if the answer can only continue with its text, else None.

        It isn't enough that all allowed tokens begin the same text: after a shorter token the answer may end or
        continue differently ("low" and "lower"). So follow the text token by token, always by the shortest allowed
        token, and check again after each of these tokens.
        """
        splits = self._splits(allowed)
        if not splits:
            return None
        (rest, longest), ahead = splits[-1], matcher
        while rest := rest[len(splits[0][0]) :]:
            ahead = ahead.deep_copy() if ahead is matcher else ahead
            ahead.consume_token(splits[0][1])
            splits = [] if ahead.is_stopped() else self._splits(self._mask_of(ahead), rest)
            if not splits:
                return None
        return longest

    def _splits(self, allowed: Mask | None, text: bytes = b"") -> Sequence[tuple[bytes, int]]:
        """Return the allowed tokens' texts and ids, shortest first, if no two of the texts contradict each other.

        Two texts contradict each other if neither is a prefix of the other. No text may contradict `text` either,
        which is known to follow. Return an empty sequence if texts contradict each other, if there are too many
        tokens to check, or if the answer may end.
        """
        if allowed is None or np.count_nonzero(allowed) > _MAX_SPLITS:
            return []
        token_ids = allowed.nonzero()[0].tolist()
        splits = sorted((self._tokenizer.decode_bytes([token_id]), token_id) for token_id in token_ids)
        longest = max([text, *(split for split, _ in splits)], key=len)
        are_one = all(split and longest.startswith(split) for split, _ in splits)
        return splits if are_one and not set(token_ids) & set(self._tokenizer.eos_tokens) else []

    def _asked(self) -> Mask | None:
        """Return the next mask, which is computed now if necessary, or None if there is an error."""
        if not (self._is_asked or self.compute_mask()):
            self._restart()
            self._mask, self._is_asked = self._mask_of(self._matcher), True
        return self._mask

    def _mask_of(self, matcher: LLMatcher) -> Mask | None:
        return mask_of(matcher, self._tokenizer.vocab_size)

    @property
    def _may_restart(self) -> bool:
        return not self._is_alone and self.compiled.seconds < _QUICK

    def _restart(self) -> None:
        """If possible, compile the grammar again, and repeat the answer so far in the new matcher.

        The new matcher has its own lexer states. The old matcher shares lexer states with other answers, which may
        have reached the limit on the number of states.
        """
        self.compiled.is_spoilt = True
        if self._may_restart:
            self._is_alone = True
            self._matcher = self._compile_again()
            self._matcher.consume_tokens(self._token_ids)


def mask_of(matcher: LLMatcher, vocab_size: int) -> Mask | None:
    """Return the matcher's next mask, or None if the matcher has an error. This releases the GIL."""
    bits = np.zeros(-(-vocab_size // 32), np.uint32)
    matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
    return _unpacked(matcher, bits, vocab_size)


def masks_of(executor: LLExecutor, matchers: Sequence[LLMatcher], vocab_size: int) -> list[Mask | None]:
    """Return the matchers' next masks.

    Several masks are computed by the executor's threads, and a single mask by this thread.
    """
    bits = np.zeros((len(matchers), -(-vocab_size // 32)), np.uint32)
    places = [(matcher, place) for place, matcher in enumerate(matchers)]
    executor.unsafe_compute_mask_ptr(places, bits.ctypes.data, bits[0].nbytes, len(matchers))
    return [_unpacked(matcher, row, vocab_size) for matcher, row in zip(matchers, bits, strict=True)]


def _unpacked(matcher: LLMatcher, bits: NDArray[np.uint32], vocab_size: int) -> Mask | None:
    if matcher.is_error():
        return None
    return np.unpackbits(bits.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


class Guidance:
    """A cache of checked and compiled grammars for one tokenizer."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        """`tokenizer` is the text of a Hugging Face tokenizer.json, and `vocab_size` the width of the logits."""
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._checker = GrammarChecker(tokenizer, vocab_size, eos_token_ids, without_secrets())
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler", step_back)
        self._turn = threading.Lock()  # one grammar is checked at a time
        self._lock = threading.Lock()  # protects `_kept`
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, Compiled] = OrderedDict()  # least recently used first

    def start(self) -> None:
        """Prepare the tokenizer, and start the process that vets grammars, in the background."""
        self._compiler.submit(self._ready_tokenizer)
        # Not on the compiler's thread, because the process would inherit its low priority.
        threading.Thread(target=self._checker.start, name="grammar-check", daemon=True).start()

    def close(self) -> None:
        """End the process that vets grammars and the thread that compiles them."""
        self._checker.close()
        self._compiler.shutdown(wait=True, cancel_futures=True)

    def check(self, grammar: Grammar) -> None:
        """Vet, compile and cache a grammar. Any thread may call this.

        This blocks while earlier grammars are checked, and then for a second or two (longer on a busy machine).
        Raise InvalidInput on the grammar's field if the grammar is refused, or TryAgain if it can't be checked
        now.
        """
        if self.is_usable(grammar):
            return
        if not self._turn.acquire(timeout=_TURN_SECONDS):
            raise QueueFull("too many grammars wait to be compiled", reason="queue")
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
        """Return whether the cache has this grammar."""
        return self._find(grammar) is not None

    def constraint(self, grammar: Grammar) -> Constraint:
        """Return the constraint of a new sequence, under a grammar that `check` has accepted."""
        kept = self._find(grammar) or self._keep(grammar)  # compile it again if it was evicted since
        return Constraint(grammar, kept, partial(self._compile, grammar), self._ready_tokenizer())

    def is_usable(self, grammar: Grammar) -> bool:
        """Return whether the grammar is cached and not spoilt, so that `check` returns at once.

        Any thread may call this.
        """
        kept = self._find(grammar)
        return kept is not None and not kept.is_spoilt

    def _find(self, grammar: Grammar) -> Compiled | None:
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
            return kept

    def _keep(self, grammar: Grammar) -> Compiled:
        begun = time.thread_time()
        matcher = self._compile(grammar)
        kept = Compiled(matcher, time.thread_time() - begun, mask_of(matcher, self._vocab_size))
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
    """Return an error on the request's field that contains the grammar."""
    loc = ("regex",) if grammar.kind == "regex" else ("response_format", "json_schema", "schema")
    return InvalidInput([FieldError(loc, message)])
