"""The folder for slow test data, which is kept between runs."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
"""Has the converted real base, among others, so that only the first run has to convert it. Safe to delete."""
