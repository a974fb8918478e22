"""How many examples a property test tries: it names its full number, of which `make test` takes a quarter.

`make fuzz` takes all. Examples that a test gives itself (`@example`) are always tried.
"""

import os

from hypothesis import settings


def num_examples(full: int) -> int:
    """For `max_examples`, where all would be `full`."""
    return full if os.environ.get("ALL_EXAMPLES") == "1" else -(-full // 4)


def set_default() -> None:
    """Likewise of the 100 that Hypothesis tries where a test says nothing else. Busy machines take their time."""
    settings.register_profile("smolora", max_examples=num_examples(100), deadline=None)
    settings.load_profile("smolora")
