"""Where what takes long to make is kept between test runs."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
"""Keeps the converted real base, among others, so that only the first run waits for it. Safe to delete."""
