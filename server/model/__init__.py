"""The frozen base model: its files, tokenizer and forward pass, and the adapters' matrices in memory."""
