"""`python -m tests.stress.failing_disk.server HOME MODEL JOURNAL PORT`: a server on a disk that fails.

It is the server of `smolora serve`, with the given journal mode.
"""

import sys
from pathlib import Path

import uvicorn

from server.api.app import create_app
from server.config import Settings
from server.database import connect
from server.database.file import JournalMode
from server.serve.startup import build
from server.storage.home import make, prepare, serving

OPERATORS = "operators-0123456789"


def serve(home: Path, model: str, journal_mode: JournalMode, port: int) -> None:
    """Serve until the process is killed."""
    make(home)
    with serving(home):
        prepare(home)
        opened = connect(home, journal_mode)  # the first connection determines the journal mode
        fields = {"home": home, "model": model, "device": "cpu", "dtype": "fp32", "adapter_cache_bytes": "4MiB"}
        settings = Settings.model_validate({**fields, "api_keys": OPERATORS, "min_free_bytes": 0})
        app = create_app(build(settings, lambda line: None))
        uvicorn.run(app, host="127.0.0.1", port=port, log_config=None)
        opened.dispose()


if __name__ == "__main__":
    home, model, journal_mode, port = sys.argv[1:]
    assert journal_mode in ("wal", "delete")
    serve(Path(home), model, "wal" if journal_mode == "wal" else "delete", int(port))
