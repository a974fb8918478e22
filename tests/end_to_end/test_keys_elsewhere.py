"""A server reachable beyond the loopback, on a database shared with other processes, sees keys created
elsewhere."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.access.keys import Keys
from server.access.principal import OPERATOR
from server.database import connect
from server.storage.home import Home
from tests.end_to_end.server_process import ServerProcess
from tests.kits.postgres import CLUSTER, Postgres

pytestmark = CLUSTER


def test_key_from_another_home_is_valid(tmp_path: Path, postgres: Postgres, converted_tiny: Path) -> None:
    url = postgres.migrated()
    flags: dict[str, Any] = {"model": converted_tiny, "host": "0.0.0.0", "dtype": "fp32", "database_url": url}
    with pytest.raises(RuntimeError, match="can be reached from elsewhere: make a key"):
        ServerProcess(tmp_path / "early", **flags)
    first = tmp_path / "first"
    engine = connect(first, url=url)
    _, secret = Keys(engine, Home(first).keyed).create("operator", who=OPERATOR)
    engine.dispose()
    server = ServerProcess(tmp_path / "new", secret, **flags)
    try:
        assert httpx.get(f"{server.url}/v1/models", trust_env=False).status_code == 401
        assert server.text("404", max_tokens=2)
    finally:
        server.close()
