"""Continuous batching over one frozen model. No HTTP, no database, no paths."""
