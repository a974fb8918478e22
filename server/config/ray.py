"""What Ray reads from the environment, as smolora's processes have it; whoever set something else keeps it."""

import os

_DEFAULTS = {
    "RAY_AUTH_MODE": "token",  # else whoever reaches its ports could run anything
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # else one that hangs is given as long as one that drains
}


def set_up_ray() -> None:
    """For this process and its children; before Ray is imported."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
