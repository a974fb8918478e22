"""The Git commit that this code was built from.

This module imports only the standard library: setup.py uses it before any dependency is installed.
"""

import subprocess
from contextlib import suppress
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
FILE = "COMMIT"
"""The file in a wheel's package `server` that has the commit."""
_TIMEOUT = 10.0  # seconds


def commit() -> str | None:
    """Return the commit of this wheel or checkout, or None if it isn't known. This may run Git and block."""
    with suppress(OSError):
        return (PACKAGE / FILE).read_text(encoding="ascii").strip() or None
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    # A service's checkout belongs to root, which Git distrusts otherwise.
    command = ["git", "-c", "safe.directory=*", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
