"""Only the loopback may be served without keys, unless a setting allows more."""

import socket
from pathlib import Path

import pytest

from server.access.keys import Keys
from server.access.principal import OPERATOR
from server.config import Settings, load
from server.database import connect
from server.errors import StartupError
from server.serve.address import bind, first_key, refuse_strangers
from server.storage.home import Home


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_other_addresses_than_the_loopback_need_keys_or_a_setting(host: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="SMOLORA_API_KEYS"):
        refuse_strangers(load(Settings, home=tmp_path, host=host))
    refuse_strangers(load(Settings, home=tmp_path, host=host, api_keys="operators-0123456789"))
    for anonymous in ("until-keyed", "1", True):
        refuse_strangers(load(Settings, home=tmp_path, host=host, allow_anonymous=anonymous))
    Keys(connect(tmp_path), Home(tmp_path).keyed).create("one", who=OPERATOR)
    refuse_strangers(load(Settings, home=tmp_path, host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_loopback_needs_no_keys(host: str, tmp_path: Path) -> None:
    refuse_strangers(load(Settings, home=tmp_path, host=host))


def test_the_command_for_a_first_key_names_this_home(tmp_path: Path) -> None:
    assert first_key(load(Settings)).endswith("smolora keys create NAME")
    elsewhere = tmp_path / "a home"
    assert first_key(load(Settings, home=elsewhere)).endswith(f"smolora keys create NAME --home '{elsewhere}'")


def test_an_address_of_this_machine_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other addresses may be a router's. A taken address doesn't lead to another one."""
    found = {
        address: socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        for address in ("192.0.2.1", "127.0.0.1")
    }
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: list(found.values()))
    with bind("smolora.example.org", 0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"
    found.pop("127.0.0.1")
    with pytest.raises(StartupError, match=r"smolora\.example\.org"):
        bind("smolora.example.org", 0)
