"""The keys as a running server remembers them: a request costs one look at a counter, not a query.

The counter is the database's own, which any commit of another connection moves; then `access_changes` says whether
keys or projects did. So a key that was revoked, here or by a command on HOME, opens nothing from the next request
on, and whoever is being answered is told within `WATCH_SECONDS`. Everything here is for one event loop.
"""

import asyncio
import hmac
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from adapters.errors import Unavailable
from adapters.viewpoint import DEFAULT_PROJECT
from server.access.keys import ApiKey, Keys, digest_of
from server.access.principal import EVERYBODY, SCOPES, Principal, Quota
from server.access.projects import Projects

WATCH_SECONDS = 0.1
"""Between looks while answers are on their way."""


class KeyRing:
    """Tells principals by secrets.

    `changes` gives the number of `access_changes`, cheaply. `fixed` are secrets that a setting gives: the
    operator's. With `allow_anonymous`, who brings none is let in whatever keys there are.
    """

    def __init__(
        self,
        keys: Keys,
        projects: Projects,
        changes: Callable[[], int],
        fixed: Sequence[str] = (),
        allow_anonymous: bool = False,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._keys = keys
        self._projects = projects
        self._changes = changes
        self._fixed = {digest_of(secret): _of_setting(digest_of(secret)) for secret in fixed}
        self._allow_anonymous = allow_anonymous
        self._now = now
        self._seen: int | None = None
        self._by_digest: Mapping[str, ApiKey] = {}
        self._are_there = True
        self._by_id: Mapping[str, ApiKey] = {}
        self._quotas: Mapping[str, Quota] = {}
        self._used: dict[str, datetime] = {}
        self._ends: dict[str, asyncio.Future[None]] = {}

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._fixed and (self._allow_anonymous or not self._are_there)

    def refresh(self) -> None:
        """Read keys and projects anew, if any has changed."""
        if (number := self._changes()) == self._seen:
            return
        self._by_digest = self._keys.by_digest()
        self._are_there = self._keys.are_there()
        self._by_id = {key.id: key for key in self._by_digest.values()}
        self._quotas = {project.name: project.quota for project in self._projects.list()}
        self._seen = number
        for key_id in list(self._ends):
            self._end_if_invalid(key_id)

    def principal(self, secret: str | None) -> Principal | None:
        """Who brings this secret, or none; None where it is nobody."""
        self.refresh()
        if secret is None:
            return self._limited(EVERYBODY) if self.is_open else None
        digest = digest_of(secret)
        for known, principal in self._fixed.items():
            if hmac.compare_digest(digest, known):
                return self._limited(principal)
        # found by the digest of 256 random bits: how long that takes tells nothing of any secret
        key = self._by_digest.get(digest)
        now = self._now()
        if key is not None and key.is_valid(now):
            self._used[key.id] = now
            sees_all = "admin" in key.scopes
            found = Principal(key.project, key.id, frozenset(key.scopes), key.quota, sees_all=sees_all)
            return self._limited(found)
        # before there are keys clients send whatever they were made with, such as "unused"
        return self._limited(EVERYBODY) if self.is_open and not self._are_there else None

    def within(self, principal: Principal, project: str) -> Principal | None:
        """The operator at work in one project, which it then sees as that project does. None: there is no such."""
        if project not in self._quotas and project != DEFAULT_PROJECT:
            return None
        return replace(
            principal, project=project, project_quota=self._quotas.get(project, Quota()), sees_all=False
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
        """Notice what nobody's request would; until cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._ends:
                with suppress(Unavailable):  # the next look may find the database there again
                    self.refresh()
                for key_id in list(self._ends):
                    self._end_if_invalid(key_id)

    def _end_if_invalid(self, key_id: str) -> None:
        key = self._by_id.get(key_id)
        if key is not None and not key.is_valid(self._now()):
            self._ends.pop(key_id).set_result(None)

    def _limited(self, principal: Principal) -> Principal:
        quota = self._quotas.get(principal.project)
        return principal if quota is None else replace(principal, project_quota=quota)


def _of_setting(digest: str) -> Principal:
    """An operator's, called by the beginning of its digest."""
    return Principal(DEFAULT_PROJECT, f"env-{digest[:12]}", frozenset(SCOPES), sees_all=True)
