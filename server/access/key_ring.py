"""The keys as a running server remembers them: a request costs one look at a counter, not a query.

The counter is the database's own, which any commit of another connection moves; then `access_changes` says whether
keys or projects did. So a key that was revoked, here or by a command on HOME, opens nothing from the next request
on, and whoever is being answered is told within `WATCH_SECONDS`. Of a database elsewhere other servers hear within
milliseconds; one that knows no key for a secret asks before it says so. Everything here is for one event loop,
which waits neither for a database elsewhere nor while all keys are read: threads do that, for all requests that
wait at once.
"""

import asyncio
import hmac
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from anyio import CapacityLimiter, to_thread
from sqlalchemy.exc import SQLAlchemyError

from adapters.errors import Unavailable
from adapters.viewpoint import DEFAULT_PROJECT
from server.access.keys import ApiKey, Keys, digest_of
from server.access.principal import EVERYBODY, GUEST, SCOPES, Principal, Quota
from server.access.projects import Projects
from server.operator_keys import OperatorKeys

WATCH_SECONDS = 0.1
"""Between looks."""
_OF_SETTING = "env-"

KeyFault = Literal["missing", "unknown", "expired", "revoked"]


@dataclass(frozen=True)
class _Remembered:
    """What the database said, at a number of `changes`."""

    number: int | None
    by_digest: Mapping[str, ApiKey]
    are_there: bool
    quotas: Mapping[str, Quota]


class KeyRing:
    """Tells principals by secrets.

    `commits` is a number that any commit moves, cheaply; `changes` asks the database for that of `access_changes`,
    and is the same by default. `fixed` is the setting API_KEYS, the operator's keys. With `allow_guests`,
    a client without a key is a `GUEST`, whatever keys there are. `is_remote`: the database is asked by threads.
    """

    def __init__(
        self,
        keys: Keys,
        projects: Projects,
        commits: Callable[[], int],
        fixed: Sequence[str] = (),
        allow_guests: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        changes: Callable[[], int] | None = None,
        is_remote: bool = False,
    ) -> None:
        self._keys = keys
        self._projects = projects
        self._commits = commits
        self._changes = changes or commits
        self._is_remote = is_remote
        self._operator = OperatorKeys(fixed)
        self._fixed: dict[str, Principal] = {}
        self._allow_guests = allow_guests
        self._now = now
        self._seen: int | None = None  # of `commits`
        self._known = _Remembered(None, {}, True, {})
        self._by_id: Mapping[str, ApiKey] = {}
        self._reading = asyncio.Lock()
        self._thread: CapacityLimiter | None = None  # its own: others may hold all that there are for long
        self._num_asked = self._num_answered = 0
        self._fault: Unavailable | None = None
        self._used: dict[str, datetime] = {}
        self._ends: dict[str, asyncio.Future[None]] = {}
        self._read_operators_keys(is_first=True)

    @property
    def has_keys(self) -> bool:
        """Whether a key was ever made, or a setting gives one: revoked and expired keys count."""
        return self._operator.are_given or self._known.are_there

    @property
    def anonymous(self) -> Principal | None:
        """Return who a client without a key is; None if it needs one."""
        if self._allow_guests:
            return self._limited(GUEST)
        return None if self.has_keys else self._limited(EVERYBODY)

    async def refresh(self) -> None:
        """Have what is remembered be what the database says now, and the operator's file. Raises Unavailable."""
        self._read_operators_keys()
        if (seen := self._commits()) == self._seen:
            return
        if not self._is_remote and self._changes() == self._known.number:
            self._seen = seen
            return
        self._num_asked += 1
        own = self._num_asked
        async with self._reading:
            if self._num_answered < own:  # nobody has read since
                num_asked, seen = self._num_asked, self._commits()
                if self._thread is None:
                    self._thread = CapacityLimiter(1)
                try:
                    self._take(await to_thread.run_sync(self._read, limiter=self._thread), seen)
                    self._fault = None
                except Unavailable as error:
                    self._fault = error
                    num_asked = self._num_asked  # whoever came meanwhile would wait as long again
                self._num_answered = num_asked
            if self._fault is not None:
                raise self._fault

    def refresh_now(self) -> None:
        """The same, which blocks."""
        if (seen := self._commits()) != self._seen:
            self._take(self._read(), seen)

    def _read_operators_keys(self, is_first: bool = False) -> None:
        if not (self._operator.refresh() or is_first):
            return
        digests = map(digest_of, self._operator.secrets)
        self._fixed = {digest: _of_setting(digest) for digest in digests}
        for key_id in list(self._ends):
            self._end_if_invalid(key_id)

    def _read(self) -> _Remembered:
        """Keys and projects anew, if any has changed. For any thread."""
        if (number := self._changes()) == self._known.number:
            return self._known
        quotas = {project.name: project.quota for project in self._projects.list()}
        return _Remembered(number, self._keys.by_digest(), self._keys.are_there(), quotas)

    def _take(self, read: _Remembered, seen: int) -> None:
        self._seen = seen
        if read is self._known:
            return
        self._known = read
        self._by_id = {key.id: key for key in read.by_digest.values()}
        for key_id in list(self._ends):
            self._end_if_invalid(key_id)

    async def principal(self, secret: str | None) -> Principal | None:
        """Who brings this secret, or none; None where it is nobody. Raises Unavailable."""
        await self.refresh()
        if secret is None:
            return self.anonymous
        digest = digest_of(secret)
        for known, principal in self._fixed.items():
            if hmac.compare_digest(digest, known):
                return self._limited(principal)
        # found by the digest of 256 random bits: how long that takes tells nothing of any secret
        key = self._known.by_digest.get(digest)
        if key is None and self._is_remote:  # another server may have made it just now
            self._seen = None
            await self.refresh()
            key = self._known.by_digest.get(digest)
        now = self._now()
        if key is not None and key.is_valid(now):
            self._used[key.id] = now
            sees_all = "admin" in key.scopes
            found = Principal(key.project, key.id, frozenset(key.scopes), key.quota, sees_all=sees_all)
            return self._limited(found)
        # before there are keys clients send whatever they were made with, such as "unused"
        return None if self.has_keys else self.anonymous

    def fault_of(self, secret: str | None) -> KeyFault:
        """Return why the secret opens nothing."""
        if secret is None:
            return "missing"
        if (key := self._known.by_digest.get(digest_of(secret))) is None:
            return "unknown"
        return "expired" if key.revoked_at is None else "revoked"

    def within(self, principal: Principal, project: str) -> Principal | None:
        """The operator at work in one project, which it then sees as that project does. None: there is no such."""
        if project not in self._known.quotas and project != DEFAULT_PROJECT:
            return None
        return replace(
            principal, project=project, project_quota=self._known.quotas.get(project, Quota()), sees_all=False
        )

    def end_of(self, principal: Principal) -> "asyncio.Future[None]":
        """Done when the principal's key is revoked or expires; never, where it has none that could be."""
        key_id = principal.key_id
        if (end := self._ends.get(key_id)) is None:
            end = self._ends[key_id] = asyncio.get_running_loop().create_future()
            self._end_if_invalid(key_id)
        return end

    def take_used(self) -> dict[str, datetime]:
        """When keys were used last, of those that were since this was asked last, by id."""
        used, self._used = self._used, {}
        return used

    def give_back(self, used: Mapping[str, datetime]) -> None:
        """What was taken and couldn't be stored."""
        self._used = {**used, **self._used}

    async def watch(self) -> None:
        """Notice changes that no request would, for open streams and /ready; until cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            with suppress(Unavailable, SQLAlchemyError, OSError):  # the next look may find it all there again
                await self.refresh()
            for key_id in list(self._ends):
                self._end_if_invalid(key_id)

    def _end_if_invalid(self, key_id: str) -> None:
        if key_id.startswith(_OF_SETTING):
            is_valid = any(principal.key_id == key_id for principal in self._fixed.values())
        else:
            key = self._by_id.get(key_id)
            is_valid = key is None or key.is_valid(self._now())
        if not is_valid:
            self._ends.pop(key_id).set_result(None)

    def _limited(self, principal: Principal) -> Principal:
        quota = self._known.quotas.get(principal.project)
        return principal if quota is None else replace(principal, project_quota=quota)


def _of_setting(digest: str) -> Principal:
    """Return an operator's principal, named by the beginning of its digest."""
    return Principal(DEFAULT_PROJECT, f"{_OF_SETTING}{digest[:12]}", frozenset(SCOPES), sees_all=True)
