"""Environment variables that aren't settings, and the protection of secrets in flags and variables."""

import os
import sys
from pathlib import Path

from adapters.names import near
from server.config import PREFIX, Settings
from server.errors import StartupError

RAY_DEFAULTS = {
    "RAY_AUTH_MODE": "token",  # without a token, anyone who reaches Ray's ports could run code
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",  # else each machine answers /metrics without a token
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # else a hung replica gets as much time as a draining one
    # Without this, replicas that started without autoscaling don't report its metrics once it is switched on.
    "RAY_SERVE_COLLECT_AUTOSCALING_METRICS_ON_HANDLE": "0",
    # Ray asks a process to exit, and kills it after this timeout. But if the request itself fails first, after
    # about 4.7 s, Ray doesn't kill the process. With Ray's default of 5 s, a hung process would keep its memory.
    "RAY_kill_worker_timeout_milliseconds": "2000",
}
_OTHER_VARIABLES = ("URL", "API_KEY")  # read by commands that call a server
_KEY_FLAGS = {"--api-keys": f"{PREFIX}API_KEYS", "--api-key": f"{PREFIX}API_KEY"}  # a server's, and a client's
_SECRET_FLAGS = {**_KEY_FLAGS, "--database-url": f"{PREFIX}DATABASE_URL"}
_SERVERS = ("serve", "cluster", "worker")
"""Commands without --api-key. They must reject that flag, so it stays on their command line."""


def server_url() -> str:
    """Return the default URL of the server that commands call: SMOLORA_URL, else one on this machine."""
    return os.environ.get(f"{PREFIX}URL") or _local_url()


def _local_url() -> str:
    """Return the URL of a server that is started on this machine with the same environment."""
    try:
        port = int(os.environ.get(f"{PREFIX}PORT") or Settings.model_fields["port"].default)
    except ValueError:
        raise StartupError(f"{PREFIX}PORT: must be a number") from None
    return f"http://127.0.0.1:{port}"


def log_format() -> str | None:
    """Return the log format that the environment sets, or None if it sets none.

    This is for errors before the settings are loaded.
    """
    return os.environ.get(f"{PREFIX}LOG_FORMAT")


def unknown_variables() -> list[str]:
    """Return a warning for each variable that looks like a setting but isn't one."""
    known = {*map(str.upper, Settings.model_fields), *_OTHER_VARIABLES}
    found = []
    for name in sorted(variable[len(PREFIX) :] for variable in os.environ if variable.startswith(PREFIX)):
        if name not in known:
            meant = near(name, known)
            found.append(
                f"{PREFIX}{name} is not a setting" + (f": did you mean {PREFIX}{meant}?" if meant else "")
            )
    return found


def wanted_instructions() -> str | None:
    """Return the instruction set that NATIVE_INSTRUCTIONS names, or None for the processor's best.

    With this variable, tests and benchmarks restrict native code to an older instruction set.
    """
    return os.environ.get("NATIVE_INSTRUCTIONS")


def trace_exporters() -> tuple[str, ...]:
    """Return the names of the entry points of the exporters that OpenTelemetry's own variables ask for."""
    named = os.environ.get("OTEL_TRACES_EXPORTER", "")
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or named == "none":
        return ()
    signal, general = "OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"
    if not named and not (os.environ.get(f"{signal}ENDPOINT") or os.environ.get(f"{general}ENDPOINT")):
        return ()
    protocol = os.environ.get(f"{signal}PROTOCOL") or os.environ.get(f"{general}PROTOCOL") or "http/protobuf"
    otlp = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}.get(protocol, protocol)
    return tuple(otlp if name == "otlp" else name for name in map(str.strip, (named or "otlp").split(",")) if name)


def service_manager() -> tuple[str, float | None]:
    """Return the address of the systemd that runs this process, and its watchdog's timeout in seconds.

    The address is empty if there is no systemd, and the timeout is None if there is no watchdog.
    """
    is_ours = os.environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    timeout = os.environ.get("WATCHDOG_USEC", "") if is_ours else ""
    return os.environ.get("NOTIFY_SOCKET", ""), int(timeout) / 1e6 if timeout.isdecimal() else None


def without_secrets() -> dict[str, str]:
    """Return an environment without passwords and keys, for a Python process that handles users' input."""
    names = ("PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ}


def without_service_secrets() -> dict[str, str]:
    """Return the environment without the database's URL and API keys, for processes that need neither."""
    return {name: value for name, value in os.environ.items() if name not in _SECRET_FLAGS.values()}


def ray_token_path() -> Path | None:
    """Return the file with the token of Ray's processes, or None if a variable has the token itself."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def ray_address_file() -> Path:
    """Return the file in which Ray notes the address of the last cluster that this machine started or joined."""
    scratch = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 Ray's own choice
    return Path(scratch) / "ray" / "ray_current_cluster"


def set_up_ray() -> None:
    """Set the defaults of Ray's variables for this process and its children. Call it before Ray is imported."""
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)


def hide_keys() -> None:
    """Restart this program with its secrets in the environment, if they were given as flags.

    `ps` shows a command line to every user of the machine, but an environment only to the process's own user.
    """
    kept, moved = [sys.executable], dict[str, str]()
    command = ""
    for command in sys.argv[1:]:
        if not command.startswith("-"):
            break
        if command.partition("=")[0] in _SECRET_FLAGS:
            return  # no command takes secrets before its name, and the next argument may be the secret itself
    flags = _SECRET_FLAGS.keys() - ({"--api-key"} if command in _SERVERS else {"--api-keys"})
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        flag, has_value, value = argument.partition("=")
        given = value if has_value else None
        if argument == "--":
            kept += [argument, *arguments]
        elif flag in flags and (given is not None or (given := next(arguments, None)) is not None):
            moved[_SECRET_FLAGS[flag]] = given
        else:
            kept.append(argument)
    if moved:
        os.execve(sys.executable, kept, {**os.environ, **moved})  # noqa: S606 it is this program


def forget_keys() -> bool:
    """Remove API keys from the environment, so that no child process inherits them.

    Call this after reading the settings. Return whether SMOLORA_API_KEY, a client's key, was among them.
    """
    found = {name: os.environ.pop(name, "") for name in _KEY_FLAGS.values()}
    return bool(found[_KEY_FLAGS["--api-key"]])
