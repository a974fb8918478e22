"""Finds the base's files, converts them once, and maps the weights from the converted file."""
