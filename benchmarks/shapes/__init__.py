"""Serving of larger bases with random weights."""
