"""Triton's cache, which saves most of the time of later runs."""

import os
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[4] / ".cache" / "triton"))
