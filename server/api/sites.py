"""Check a request's `Host` and `Origin` headers.

Any page that a browser shows can make the browser send requests to a server on the same machine. The browser sets
two headers that the page can't choose. `Origin` is the page's site: requests from other sites are refused before
their body is read. `Host` is the host name that the request was sent to: foreign names are refused, because
somebody may have made them resolve to this machine (DNS rebinding).
"""

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.api.routes import Watcher

ANY = "*"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SHOWN = 100  # characters of a header in an error message


class Sites:
    """A filter that refuses requests to foreign host names, and requests from pages of other sites.

    A health probe may use any host name, since the server can't know under which name a probe reaches its
    container. A metrics scraper may use any IP address, because DNS rebinding needs a name.
    """

    def __init__(self, hosts: Sequence[str], origins: Sequence[str], own_host: str) -> None:
        """Allow these hosts and origins. If `hosts` is empty, allow localhost, `own_host` and any IP address."""
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origins)
        self._own_names = frozenset({"localhost", own_host.lower()})

    def fault(self, headers: Headers, watcher: Watcher | None) -> str | None:
        """Return why a request must be refused, or None if it is allowed.

        `watcher` says whether the route is for health probes or metrics scrapers; it is None for other routes.
        """
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if watcher != "probe" and hosts and not (len(hosts) == 1 and self._answers_to(hosts[0], watcher)):
            return f"this server has no name {_shown(hosts)}: SMOLORA_ALLOWED_HOSTS sets its names"
        if origins and not (len(origins) == 1 and self._may_call(origins[0], hosts[0] if hosts else "")):
            return f"pages of {_shown(origins)} may not call this server: SMOLORA_ALLOWED_ORIGINS allows sites"
        return None

    def _answers_to(self, host: str, watcher: Watcher | None) -> bool:
        name, _ = _name_and_port(host, "http")
        if name is None:
            return False
        if self._hosts and not (watcher == "scraper" and _is_address(name)):
            parents = name.split(".")[1:]
            return bool(self._hosts & {ANY, name, *(f"*.{'.'.join(parents[i:])}" for i in range(len(parents)))})
        return name in self._own_names or _is_address(name)

    def _may_call(self, origin: str, host: str) -> bool:
        origin = origin.lower()
        if self._origins & {ANY, origin}:
            return True
        scheme, separator, rest = origin.partition("://")
        if not separator or scheme not in _DEFAULT_PORTS:
            return False  # such as "null"
        site = _name_and_port(rest, scheme)
        return site[0] is not None and site == _name_and_port(host, scheme)


def _name_and_port(host: str, scheme: str) -> tuple[str | None, int]:
    """Split a Host header into a name in lower case and a port. The name is None if the header is invalid."""
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port
    except ValueError:
        return None, 0
    if parts.path or parts.query or parts.fragment or parts.username is not None or not parts.hostname:
        return None, 0
    return parts.hostname.lower(), port or _DEFAULT_PORTS[scheme]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _shown(values: Sequence[str]) -> str:
    return ", ".join(values)[:_SHOWN].encode("ascii", "backslashreplace").decode()
