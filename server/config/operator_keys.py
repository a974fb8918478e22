"""The operator's keys, as the setting API_KEYS gives them: by themselves, or as `@FILE`, which may change.

A file that others can read is refused, except under /run/secrets: there container engines mount secrets for one
container alone, with modes that the container doesn't choose.
"""

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

MIN_LENGTH = 16
"""Characters of a key, which a person chooses; `openssl rand -hex 24` makes a good one."""
_SECRETS = Path("/run/secrets")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

log = logging.getLogger("smolora.access")


def checked(keys: Sequence[str]) -> tuple[str, ...]:
    """Return the keys. Raise ValueError if one has other characters than a header may, or can be guessed."""
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError("a key is printable ASCII without blanks")
    if any(len(key) < MIN_LENGTH for key in keys):
        raise ValueError(f"a key needs {MIN_LENGTH} characters or more: make one with openssl rand -hex 24")
    return tuple(keys)


def split(text: str) -> tuple[str, ...]:
    """Return the items between commas and line ends, without blanks around them."""
    return tuple(item for part in text.replace("\n", ",").split(",") if (item := part.strip()))


def read(path: Path) -> tuple[str, ...]:
    """Return the keys in a file. Raise ValueError if it can't be read, others can read it, or a key is no good."""
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
        raise ValueError(f"can't read the file {path}: it is no text") from None
    if not (keys := split(text)):
        raise ValueError(f"the file {path} has no keys")
    return checked(keys)


class OperatorKeys:
    """The secrets that hold now. `given` is the setting: secrets, or one item `@FILE`."""

    def __init__(self, given: Sequence[str] = ()) -> None:
        self.are_given = bool(given)
        self._path = Path(given[0][1:]) if len(given) == 1 and given[0].startswith("@") else None
        self.secrets = tuple(given) if self._path is None else ()
        self._seen: object = None

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether it has.

        A file that is no good any more opens nothing, which the log says: a key that was taken out must not hold.
        """
        if self._path is None:
            return False
        try:
            found = os.stat(self._path)
            seen: object = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
        except OSError as error:
            seen = error.errno
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            self.secrets = read(self._path)
        except ValueError as error:
            self.secrets = ()
            log.error("SMOLORA_API_KEYS: %s. No operator's key holds until then", error)
        return True
