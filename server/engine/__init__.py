"""Continuous batching over one frozen model, without HTTP, a database or file paths."""
