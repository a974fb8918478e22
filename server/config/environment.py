"""Environment variables other than the settings: NATIVE_INSTRUCTIONS for tests, and Ray's variables."""

import os

from server.config import PREFIX


def without_secrets() -> dict[str, str]:
    """Return what a Python process for users' input needs of this one's environment: no passwords or keys."""
    names = ("PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ}


def log_format() -> str | None:
    """Return the log format, which is needed even if the settings are invalid."""
    return os.environ.get(f"{PREFIX}LOG_FORMAT")


def wanted_instructions() -> str | None:
    """Return NATIVE_INSTRUCTIONS, or None for the processor's best instructions."""
    return os.environ.get("NATIVE_INSTRUCTIONS")


DEFAULTS = {
    "RAY_AUTH_MODE": "token",  # else whoever reaches its ports could run anything
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # else one that hangs is given as long as one that drains
    # Replicas that began without autoscaling else don't tell what it goes by, once it is there.
    "RAY_SERVE_COLLECT_AUTOSCALING_METRICS_ON_HANDLE": "0",
    # Ray asks a process to end, and kills it where it doesn't answer, but not if the question fails before (after
    # some 4.7 s): with its own 5 s, one that hangs would stay, and hold its memory.
    "RAY_kill_worker_timeout_milliseconds": "2000",
}


def set_up_ray() -> None:
    """For this process and its children; before Ray is imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
