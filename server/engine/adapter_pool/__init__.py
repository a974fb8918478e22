"""Adapters in the engine's memory: read, placed, held and evicted."""
