"""The tokenizer of a converted base: texts to ids, ids to texts, and the vocabulary.

It gives the same ids and texts as transformers for the same directory, but uses only the library `tokenizers`,
since importing transformers takes longer than all else that a server does with the tokenizer when it starts. A
tokenizer.json lacks the names of special tokens and the chat template, so this module adds them.
`server.model.base.checkpoint` reads directories that aren't converted, which may have older formats.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from tokenizers import AddedToken, Tokenizer

from server.errors import StartupError
from server.model.text.template import ChatTemplate


def require_byte_level(name: str, backend: Tokenizer) -> None:
    """Raise StartupError, naming the base, if the vocabulary isn't byte-level. A byte-level vocabulary, such as
    SmolLM's but not SentencePiece's, has one character for each byte."""
    if backend.decoder is None or backend.decoder.decode(["Ġ", "Ċ", "Ã", "©"]) != " \né":
        raise StartupError(
            f"{name}: the tokenizer is not byte-level, as those of SmolLM and GPT-2 are: others are not read"
        )


class BaseTokenizer:
    """One base's tokenizer. Immutable, so several threads may use it at once."""

    def __init__(self, backend: Tokenizer, special_tokens: Mapping[str, str], chat_template: str | None) -> None:
        """Take ownership of `backend`, and turn off its truncation and padding.

        `special_tokens` maps names such as `eos_token` to the tokens' texts.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = ChatTemplate(chat_template, special_tokens) if chat_template else None

    def __len__(self) -> int:
        """Return the number of tokens, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """A map from each token, in the tokenizer's spelling, to its id. Each access computes the map again."""
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def added_tokens(self) -> Mapping[int, AddedToken]:
        """The tokens that were added to the model's own, by id. Special tokens decode to no text."""
        return self.backend.get_added_tokens_decoder()

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end token, or None if the tokenizer names none."""
        eos_token = self.special_tokens.get("eos_token")
        return None if eos_token is None else self.backend.token_to_id(eos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text. Spellings of special tokens become special tokens."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of a sequence. No spaces are removed from it."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def vocabulary_of(tokenizer: BaseTokenizer) -> tuple[Mapping[str, int], Mapping[int, str], Sequence[int]]:
    """Return the vocabulary, the texts of added tokens by id, and the ids of special tokens."""
    added = tokenizer.added_tokens.items()
    return (
        tokenizer.vocabulary,
        {token_id: token.content for token_id, token in added},
        [token_id for token_id, token in added if token.special],
    )


def tokenizer_json(tokenizer: BaseTokenizer) -> str:
    """Return the content of tokenizer.json with all added tokens, without padding and truncation."""
    return tokenizer.backend.to_str()
