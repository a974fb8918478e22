"""Decisions: typed questions about an input, the prompts that ask them, and answers with probabilities.

Serving and training use the same prompts. This package knows no engine, no HTTP and no storage.
"""
