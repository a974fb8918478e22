"""Prompts of an exact number of tokens, cut from the standard library's docstrings.

No two prompts share their first block, so a prefix cache can't help. All prompts of a kind have the same length,
so a peer that pads its batches loses nothing. The same interpreter and tokenizer give the same prompts.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from server.model.text.tokenizer import BaseTokenizer

MODULES = (
    *("argparse", "ast", "asyncio/events", "collections/__init__", "contextlib", "datetime", "difflib"),
    *("email/message", "functools", "heapq", "http/client", "inspect", "logging/__init__", "pickle", "random"),
    *("shutil", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading"),
    *("typing", "unittest/case", "urllib/parse", "zipfile"),
)
BLOCK_TOKENS = 16
"""Prefix caches share blocks of about this many tokens."""


def library_text() -> str:
    """Return the docstrings of `MODULES` on one line."""
    docstrings: list[str] = []
    for name in MODULES:
        file = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
        if file.is_file():  # other Python versions may lack it
            tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            documented = (node for node in tree if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
            docstrings += [ast.get_docstring(node) or "" for node in documented]
    return " ".join(" ".join(docstrings).split())


class PromptSource:
    """A source of prompts, each handed out once."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | BaseTokenizer, text: str | None = None, *, many: bool = False
    ) -> None:
        """Prepare the source. `many`: thousands of prompts, which may share first tokens but no whole block."""
        self._tokenizer = tokenizer
        self._words = (library_text() if text is None else text).split()
        self._starts = self._start_positions()
        self._used: set[tuple[int, ...]] = set()
        # A small vocabulary has too few first tokens; then only whole blocks must differ.
        self._num_distinct = 1 if len(tokenizer) > 10_000 and not many else BLOCK_TOKENS // 2

    def take(self, count: int, num_tokens: int) -> list[str]:
        """Return `count` new prompts of `num_tokens` tokens each. Raise ValueError if the text is exhausted."""
        return [self._next(num_tokens) for _ in range(count)]

    def _next(self, num_tokens: int) -> str:
        for start in self._starts:
            ids = self._encode(" ".join(self._words[start : start + num_tokens]))[:num_tokens]
            key = tuple(ids[: self._num_distinct])
            text = self._decode(ids)
            if key not in self._used and len(ids) == num_tokens and self._encode(text) == ids:
                self._used.add(key)
                return text
        raise ValueError(f"there are no more than {len(self._used)} distinct prompts")

    def _start_positions(self) -> Iterator[int]:
        """Return the start of every word in strides, so that neighbouring prompts differ."""
        stride = 61
        return (start for offset in range(stride) for start in range(offset, len(self._words), stride))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        assert isinstance(text, str)
        return text
