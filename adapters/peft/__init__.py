"""PEFT's files: reading, checking and writing."""
