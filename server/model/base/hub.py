"""Downloads base models and adapters from the Hugging Face hub.

A model's download has the safetensors, JSON and chat template files of one commit. An adapter's download has the
adapter's two files of one commit. Downloads send no credentials, and leave nothing in the hub's cache.
"""

import errno
import time
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import InvalidInput, NotFound
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from server.errors import StartupError, Unavailable

_WANTED = ["*.safetensors", "*.json", "*.jinja"]
_UNWANTED = ["*/*.safetensors", "*/*.json"]  # copies for other runtimes, in folders of their own


@dataclass(frozen=True)
class Snapshot:
    """A model's files at one commit."""

    directory: Path
    commit: str


def download(repo_id: str, endpoint: str | None = None, cache: Path | None = None) -> Snapshot:
    """Return the files of the model's newest commit, or of the newest cached one if the hub can't be reached.

    If `endpoint` or `cache` is None, the hub client's defaults and environment variables apply. Raise StartupError
    if neither the hub nor the cache has the model.
    """
    from huggingface_hub import HfApi  # takes 0.1 s, so only if needed
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = HfApi(endpoint=endpoint)
    try:  # the hub's client chooses one commit first, and names the snapshot's directory after it
        directory = hub.snapshot_download(
            repo_id, cache_dir=cache, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except RepositoryNotFoundError as error:
        reason = "the hub has no such model, or asks for a token"
        raise StartupError(f"SMOLORA_MODEL={repo_id}: not a local directory, and {reason}") from error
    except Exception as error:  # no network, a timeout or a broken transfer, each with its own type
        reason = f"the hub can't be reached ({_cause(error)})"
        raise StartupError(f"SMOLORA_MODEL={repo_id}: not a local directory, and {reason}") from error
    return Snapshot(Path(directory), commit=Path(directory).name)


def _cause(error: BaseException) -> str:
    """Return the first line of the network error that caused `error`, without the hub client's additions."""
    while error.__cause__ is not None and "httpcore" not in type(error.__cause__).__module__:
        error = error.__cause__
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


_RETRY_SECONDS = 30.0
_SILENT_SECONDS = 30.0
"""Timeout of a read from the hub."""


@dataclass(frozen=True)
class HubAdapter:
    """An adapter's files at one commit. `weights` is in the directory of the download."""

    commit: str
    config_json: bytes
    weights: Path


def fetch_adapter(
    repo_id: str,
    revision: str | None,
    directory: Path,
    *,
    max_config: int,
    max_weights: int,
    timeout: float,
    endpoint: str | None = None,
) -> HubAdapter:
    """Download an adapter's files at a revision (a branch, a tag or a commit; None: the newest commit).

    `max_config` and `max_weights` limit the bytes of each file; `timeout` is in seconds. Raise
    NotFound if the hub has no such adapter or revision, InvalidInput if the id is malformed or a file is too
    large, and Unavailable if the hub can't be reached or takes too long.
    """
    from huggingface_hub import HfApi, hf_hub_url  # takes 0.1 s, so only if needed
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    deadline = time.monotonic() + timeout
    hub = HfApi(endpoint=endpoint, token=False)
    try:
        info = hub.model_info(repo_id, revision=revision, files_metadata=True, timeout=_SILENT_SECONDS)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        commit = info.sha or ""
        limits = {CONFIG_NAME: max_config, WEIGHTS_NAME: max_weights}
        for name, limit in limits.items():
            if name not in sizes:
                raise NotFound(f"{repo_id} has no {name}: it isn't an adapter as PEFT saves them now")
            _check_size(name, sizes[name] or 0, limit)
        for name, limit in limits.items():
            url = hf_hub_url(repo_id, name, revision=commit, endpoint=hub.endpoint)
            if not _download(url, directory / name, limit, deadline):
                message = f"the hub took longer than SMOLORA_REQUEST_TIMEOUT ({timeout:g} s) to send {name}"
                raise Unavailable(message, _RETRY_SECONDS)
        return HubAdapter(commit, (directory / CONFIG_NAME).read_bytes(), directory / WEIGHTS_NAME)
    except (NotFound, InvalidInput, Unavailable):
        raise
    except RevisionNotFoundError:
        raise NotFound(f"{repo_id} has no such revision") from None
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise NotFound(f"the hub has no {repo_id} that is open to all") from None
    except HFValidationError:
        raise InvalidInput.of("repo_id", "isn't a repository's id, such as someone/tweets") from None
    except Exception as error:  # no network, a timeout or a broken transfer, each with its own type
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unavailable("the hub can't be reached", _RETRY_SECONDS) from error


def _download(url: str, path: Path, limit: int, deadline: float) -> bool:
    """Download `url` to `path`. Return False if the download isn't complete by `deadline`. Raise InvalidInput if
    the file has over `limit` bytes.

    The hub client's functions check neither time nor size during a download.
    """
    from huggingface_hub import get_session, hf_raise_for_status

    with (
        get_session().stream("GET", url, timeout=_SILENT_SECONDS) as response,
        path.open("wb") as file,
    ):
        hf_raise_for_status(response)
        for piece in response.iter_bytes():
            if time.monotonic() > deadline:
                return False
            file.write(piece)
            _check_size(path.name, file.tell(), limit)
    return True


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise InvalidInput.of("repo_id", f"its {name} has {size} bytes, and may have {limit}")
