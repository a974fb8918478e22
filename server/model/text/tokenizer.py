"""The tokenizer of a converted base: texts to ids, ids to texts, conversations to texts.

Promises: the ids and texts that transformers has for the same directory. It is the library `tokenizers` with two
things beside it that a tokenizer.json lacks, the names of special tokens and the chat template: importing
transformers takes longer than all else that a start does with a tokenizer. Leaves to others: directories that
nobody converted, in which older and newer forms mean the same thing (`server.model.base.checkpoint`).

What a tokenizer's ids stand for, for those who have to do with tokens and shouldn't know tokenizers.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from tokenizers import AddedToken, Tokenizer

from server.errors import StartupError
from server.model.text.template import ChatTemplate


def require_byte_level(name: str, backend: Tokenizer) -> None:
    """Raise StartupError, which names the base, where tokens aren't written as bytes, a character for each, as
    SmolLM's are: those of SentencePiece, say."""
    if backend.decoder is None or backend.decoder.decode(["Ġ", "Ċ", "Ã", "©"]) != " \né":
        raise StartupError(
            f"{name}: the tokenizer is not byte-level, as those of SmolLM and GPT-2 are: others are not read"
        )


class BaseTokenizer:
    """One base's. Safe to use from several threads at once, as nothing changes it."""

    def __init__(self, backend: Tokenizer, special_tokens: Mapping[str, str], chat_template: str | None) -> None:
        """`special_tokens`: each one's text by its name, such as `eos_token`.

        `backend` is this one's from now on. It neither truncates nor pads.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = ChatTemplate(chat_template, special_tokens) if chat_template else None
        self._eos_token = special_tokens.get("eos_token")

    def __len__(self) -> int:
        """How many tokens there are, added ones too."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Each token as the tokenizer writes it, and its id. Made anew whenever it is asked for."""
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def added_tokens(self) -> Mapping[int, AddedToken]:
        """Those that stand beside the model's own by their ids; `special` ones say no text."""
        return self.backend.get_added_tokens_decoder()

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end token, if one is named."""
        return None if self._eos_token is None else self.backend.token_to_id(self._eos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, in which what looks like a special token is one."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of a sequence, in which no space is tidied away."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def vocabulary_of(tokenizer: BaseTokenizer) -> tuple[Mapping[str, int], Mapping[int, str], Sequence[int]]:
    """(each token as the tokenizer writes it, and its id; ids of tokens in plain text; ids of special tokens)."""
    added = tokenizer.added_tokens.items()
    return (
        tokenizer.vocabulary,
        {token_id: token.content for token_id, token in added},
        [token_id for token_id, token in added if token.special],
    )


def tokenizer_json(tokenizer: BaseTokenizer) -> str:
    """The text of its tokenizer.json, with all added tokens, and without padding and truncation."""
    return tokenizer.backend.to_str()
