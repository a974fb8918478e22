"""Which instructions native code is held to, for tests and measurements of lesser processors."""

import os


def wanted_instructions() -> str | None:
    """What NATIVE_INSTRUCTIONS names; None for the best that the processor has."""
    return os.environ.get("NATIVE_INSTRUCTIONS")
