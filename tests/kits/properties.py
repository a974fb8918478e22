"""The number of examples of property tests: `make test` runs a quarter of a test's full number, `make fuzz` all.

Explicit examples (`@example`) always run.
"""

import os

from hypothesis import settings


def num_examples(full: int) -> int:
    """Return the value of `max_examples` for a full number of examples."""
    return full if os.environ.get("ALL_EXAMPLES") == "1" else -(-full // 4)


def set_default() -> None:
    """Set the default, from Hypothesis' 100 examples. There is no deadline, since test machines are busy."""
    settings.register_profile("smolora", max_examples=num_examples(100), deadline=None)
    settings.load_profile("smolora")
