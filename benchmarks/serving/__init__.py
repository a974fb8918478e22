"""Serving benchmark: its loads, the systems that run them, and the measurements."""
