"""The operator's keys. The setting API_KEYS lists the keys, or names a file of keys as `@FILE`.

A file that other users can read is refused, except under /run/secrets: container engines mount secrets there for
one container alone, with modes that the container doesn't choose.
"""

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

MIN_LENGTH = 16
"""The minimum length of a key in characters. Operators choose these keys themselves."""
_SECRETS = Path("/run/secrets")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

log = logging.getLogger("smolora.access")


def checked(keys: Sequence[str]) -> tuple[str, ...]:
    """Return the keys. Raise ValueError if one is too short, or has characters that a header can't carry."""
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError("a key is printable ASCII without blanks")
    if any(len(key) < MIN_LENGTH for key in keys):
        raise ValueError(f"a key needs {MIN_LENGTH} characters or more: make one with openssl rand -hex 24")
    return tuple(keys)


def split(text: str) -> tuple[str, ...]:
    """Split at commas and line ends, and strip blanks; skip empty items."""
    return tuple(item for part in text.replace("\n", ",").split(",") if (item := part.strip()))


def read(path: Path) -> tuple[str, ...]:
    """Return the keys in a file.

    Raise ValueError if the file is unreadable, other users can read or write it, or a key is invalid.
    """
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & _OTHERS and not path.resolve().is_relative_to(_SECRETS):
                raise ValueError(
                    f"others may read or write the file {path} (mode {stat.S_IMODE(mode):o}): chmod 600 {path}, "
                    f"or mount it under {_SECRETS} if it is a container's secret"
                )
            text = file.read()
    except OSError as error:
        raise ValueError(f"can't read the file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"can't read the file {path}: it is not text") from None
    if not (keys := split(text)):
        raise ValueError(f"the file {path} has no keys")
    return checked(keys)


class OperatorKeys:
    """The operator's keys that are valid now. `given` is the setting API_KEYS: keys, or one `@FILE`."""

    def __init__(self, given: Sequence[str] = ()) -> None:
        self.are_given = bool(given)
        self._path = Path(given[0][1:]) if len(given) == 1 and given[0].startswith("@") else None
        self.secrets = tuple(given) if self._path is None else ()
        self._seen: object = None

    def refresh(self, always: bool = False) -> bool:
        """Read the file of keys again if it has changed, or `always`. Return whether it was read.

        If the file has become invalid, log why and accept no key, so that a removed key can't stay valid.
        """
        if self._path is None:
            return False
        try:
            found = os.stat(self._path)
            seen: object = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        except OSError as error:
            seen = error.errno
        if seen == self._seen and not always:
            return False
        self._seen = seen
        try:
            self.secrets = read(self._path)
        except ValueError as error:
            self.secrets = ()
            log.error("SMOLORA_API_KEYS: %s. No operator's key is accepted until this is fixed", error)
        return True
