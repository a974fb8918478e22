"""LoRA adapters: their weights, files, names and storage.

Imports torch and never `server`; see docs/architecture.md for the direction of imports.
"""
