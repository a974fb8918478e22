"""What is trained on: rows in files, checked, tokenized, split and stored."""
