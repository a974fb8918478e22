"""Fetches a model from the Hugging Face hub: one commit of it, safetensors, JSON and chat templates only."""

from dataclasses import dataclass
from pathlib import Path

from server.errors import StartupError

_WANTED = ["*.safetensors", "*.json", "*.jinja"]
_UNWANTED = ["*/*.safetensors", "*/*.json"]  # copies for other runtimes, in folders of their own


@dataclass(frozen=True)
class Snapshot:
    """A model's files as of one commit."""

    directory: Path
    commit: str


def download(repo_id: str, endpoint: str | None = None, cache: Path | None = None) -> Snapshot:
    """The files of the model's newest commit; where the hub can't be reached, of the newest in its cache here.

    `endpoint` and `cache` None: the hub's own, as its environment variables say. Raises StartupError.
    """
    from huggingface_hub import HfApi  # a tenth of a second that other starts are spared
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = HfApi(endpoint=endpoint)
    try:  # the hub's client settles on one commit first, and names the snapshot's folder by it
        directory = hub.snapshot_download(
            repo_id, cache_dir=cache, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except RepositoryNotFoundError as error:
        reason = "the hub has no such model, or asks for a token"
        raise StartupError(f"SMOLORA_MODEL={repo_id}: not a local directory, and {reason}") from error
    except Exception as error:  # no network, a timeout, a broken transfer: each has a type of its own
        reason = f"the hub can't be reached ({_cause(error)})"
        raise StartupError(f"SMOLORA_MODEL={repo_id}: not a local directory, and {reason}") from error
    return Snapshot(Path(directory), commit=Path(directory).name)


def _cause(error: BaseException) -> str:
    """What the network said, below the client's own explanations."""
    while error.__cause__ is not None and "httpcore" not in type(error.__cause__).__module__:
        error = error.__cause__
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
