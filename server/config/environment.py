"""What a process that this one starts finds in its environment."""

import os


def with_scratch(place: str) -> dict[str, str]:
    """What this process has, and that folder in the place of /tmp."""
    return {**os.environ, "TMPDIR": place}
