"""Serving random bases of larger sizes."""
