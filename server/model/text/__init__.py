"""Between texts and tokens: chat templates, special tokens, the vocabulary."""
