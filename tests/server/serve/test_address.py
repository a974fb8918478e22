"""For whom a server may listen: off the loopback somebody is asked for a key, or it was said that nobody is."""

from pathlib import Path

import pytest

from server.access.keys import Keys
from server.access.principal import OPERATOR
from server.config import Settings, load
from server.database import connect
from server.errors import StartupError
from server.home import Home
from server.serve.address import refuse_strangers


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_off_the_loopback_needs_keys_or_a_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="SMOLORA_API_KEYS"):
        refuse_strangers(load(Settings, home=tmp_path, host=host))
    refuse_strangers(load(Settings, home=tmp_path, host=host, api_keys="k"))
    refuse_strangers(load(Settings, home=tmp_path, host=host, allow_anonymous=True))
    Keys(connect(tmp_path), Home(tmp_path).keyed).create("one", who=OPERATOR)
    refuse_strangers(load(Settings, home=tmp_path, host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str, tmp_path: Path) -> None:
    refuse_strangers(load(Settings, home=tmp_path, host=host))
