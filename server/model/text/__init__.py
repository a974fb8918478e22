"""Texts and tokens: the tokenizer, chat templates, special tokens, the vocabulary."""
