"""What a tokenizer's ids stand for, for those who have to do with tokens and shouldn't know tokenizers."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Mapping[str, int], Mapping[int, str], Sequence[int]]:
    """(each token as the tokenizer writes it, and its id; ids of tokens in plain text; ids of special tokens)."""
    added = tokenizer.added_tokens_decoder.items()
    return (
        tokenizer.get_vocab(),
        {token_id: token.content for token_id, token in added},
        [token_id for token_id, token in added if token.special],
    )


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of its tokenizer.json, with all added tokens, and without padding and truncation."""
    backend = tokenizer.backend_tokenizer
    if backend.padding is None and backend.truncation is None:
        return str(backend.to_str())
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy.to_str()
