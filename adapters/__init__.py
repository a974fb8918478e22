"""What a LoRA adapter is: its weights, its files, its names and its place on disk.

Imports torch and never `server`; see docs/architecture.md for the direction of imports.
"""
