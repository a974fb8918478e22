"""PEFT's files: read and checked, and written."""
