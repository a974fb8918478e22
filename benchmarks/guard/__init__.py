"""Regression check: compares the ratios of a quick run with the recorded ones."""
