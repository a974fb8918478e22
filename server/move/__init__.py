"""Moves everything of a HOME into a cluster's database and object store, and back, while nobody uses either."""
