"""Room on the disk that is left to what runs already."""

import shutil
from typing import TYPE_CHECKING

from server.api.access.quotas import require_quota
from server.config import Settings
from server.errors import Unavailable

if TYPE_CHECKING:
    from server.api.deps import Services

_RETRY_SECONDS = 60.0


def require_room(services: "Services") -> None:
    """Raise Unavailable or Forbidden where the disk, or the caller's quota, leaves none for a new job."""
    require_space(services.settings)
    require_quota(services)


def require_space(settings: Settings) -> None:
    """Raise Unavailable where the disk of HOME has less than what new uploads and jobs must leave."""
    if shutil.disk_usage(settings.home).free < settings.min_free_bytes:
        least = settings.min_free_bytes.human_readable()
        message = f"the server's disk has less than {least} left (SMOLORA_MIN_FREE_BYTES)"
        raise Unavailable(message, retry_after=_RETRY_SECONDS)
