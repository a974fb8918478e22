"""Room on the disk that is left to what runs already."""

import shutil

from server.config import Settings
from server.errors import Unavailable

_RETRY_SECONDS = 60.0


def require_space(settings: Settings) -> None:
    """Raise Unavailable where the disk of HOME has less than what new uploads and jobs must leave."""
    if shutil.disk_usage(settings.home).free < settings.min_free_bytes:
        least = settings.min_free_bytes.human_readable()
        message = f"the server's disk has less than {least} left (SMOLORA_MIN_FREE_BYTES)"
        raise Unavailable(message, retry_after=_RETRY_SECONDS)
