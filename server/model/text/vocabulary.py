"""What a tokenizer's ids stand for, for those who have to do with tokens and shouldn't know tokenizers."""

from collections.abc import Mapping, Sequence

from server.model.text.tokenizer import BaseTokenizer


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
