"""Fetches an adapter from the Hugging Face hub: its two files, as of one commit, and nothing else.

No credentials of this machine are sent, and nothing is kept but what is returned. What the files mean is
`adapters.peft.files`'s part.
"""

import errno
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import InvalidInput, NotFound
from adapters.peft.files import CONFIG_NAME, WEIGHTS_NAME
from server.errors import Unavailable

_RETRY_SECONDS = 30.0
_INFO_SECONDS = 30.0


@dataclass(frozen=True)
class HubAdapter:
    """The files as of `commit`. `weights` lies in the directory that was given."""

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
    endpoint: str | None = None,
) -> HubAdapter:
    """Download into `directory` what the revision (a branch, a tag, a commit; None: the newest) comes to now.

    The limits are bytes. Raises NotFound, InvalidInput where a file is too large, or Unavailable.
    """
    from huggingface_hub import HfApi  # a tenth of a second that starts are spared
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = HfApi(endpoint=endpoint, token=False)
    try:
        info = hub.model_info(repo_id, revision=revision, files_metadata=True, timeout=_INFO_SECONDS)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        commit = info.sha or ""
        for name, limit in ((CONFIG_NAME, max_config), (WEIGHTS_NAME, max_weights)):
            if name not in sizes:
                raise NotFound(f"{repo_id} has no {name}: it isn't an adapter as PEFT saves them now")
            _check_size(name, sizes[name] or 0, limit)
        paths = {
            name: Path(hub.hf_hub_download(repo_id, name, revision=commit, local_dir=directory))
            for name in (CONFIG_NAME, WEIGHTS_NAME)
        }
        for name, limit in ((CONFIG_NAME, max_config), (WEIGHTS_NAME, max_weights)):
            _check_size(name, paths[name].stat().st_size, limit)
        return HubAdapter(commit, paths[CONFIG_NAME].read_bytes(), paths[WEIGHTS_NAME])
    except (NotFound, InvalidInput):
        raise
    except RevisionNotFoundError:
        raise NotFound(f"{repo_id} has no such revision") from None
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise NotFound(f"the hub has no {repo_id} that is open to all") from None
    except HFValidationError:
        raise InvalidInput.of("repo_id", "isn't a repository's id, such as someone/tweets") from None
    except Exception as error:  # no network, a timeout, a broken transfer: each has a type of its own
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unavailable("the hub can't be reached", _RETRY_SECONDS) from error


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise InvalidInput.of("repo_id", f"its {name} has {size} bytes, and may have {limit}")
