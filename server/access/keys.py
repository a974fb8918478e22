"""API keys: created once, stored as digests, and revoked permanently; and a running server's cache of them.

Every change is one transaction with its audit entry. A secret has 256 random bits, so it can't be found by trying
secrets against its plain SHA-256, and a slow hash would add no protection.

Authenticating a request needs no query. A cheap counter changes with every commit to the database. Only if it has
changed does the server read the table `access_changes`, whose number changes whenever keys or projects change. So
a revoked key is refused from the next request on, whether this server revoked it or a command with the same HOME
directory. The key's open answers end within `WATCH_SECONDS`. With PostgreSQL, other servers notice within
milliseconds; a server that doesn't know a key reads the database before it refuses the key.

Use the cache from one event loop. Reads of a remote database, and reads of all keys, run in threads, so that the
event loop never waits. Concurrent requests share one read.
"""

import asyncio
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypedDict

import sqlalchemy as sa
from anyio import CapacityLimiter, to_thread
from sqlalchemy.exc import SQLAlchemyError

from adapters.errors import Conflict, FieldError, Hint, InvalidInput, LimitReached, NotFound, Unavailable
from adapters.names import DEFAULT_PROJECT, NAME_RULE, is_name, project_fault
from adapters.sql import reader_of, transact
from adapters.storage.durable import new_file
from server.access.audit import record
from server.access.managers import check_grant, exceeding, manages, require_manager
from server.access.principal import (
    DEFAULT_SCOPES,
    EVERYBODY,
    GUEST,
    LIMITS,
    OF_SETTING,
    OPERATORS_SCOPES,
    SCOPES,
    Principal,
    Quota,
    Scope,
)
from server.access.projects import Projects, ensure, quota_of
from server.access.tables import api_keys, changed
from server.config.operator_keys import OperatorKeys
from server.database import without_writers_lock
from server.database.silence import Outage
from server.system.messages import plural

PREFIX = "sk-smolora-"
MAX_MANAGED = 1000
"""Keys of a project, revoked ones included, up to which its managers can make more.

Each change of a key makes every server read all keys.
"""

log = logging.getLogger("smolora.access")


@dataclass(frozen=True)
class ApiKey:
    """An API key without its secret."""

    id: str
    name: str
    project: str
    scopes: tuple[Scope, ...]
    created_at: datetime  # all times are in UTC
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    quota: Quota

    def to_document(self) -> dict[str, object]:
        """Return a JSON-ready document. The quota's fields are at its top level, not nested."""
        fields = asdict(self)
        limits = fields.pop("quota")
        shown = {name: v.isoformat() if isinstance(v, datetime) else v for name, v in fields.items()}
        return {**shown, "scopes": list(self.scopes), **limits}

    def is_valid(self, now: datetime) -> bool:
        """Return whether the key is valid at that time."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def digest_of(secret: str) -> str:
    """Return the secret's SHA-256 (hex), which is stored instead of the secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyChanges(TypedDict, total=False):
    """What `Keys.change` changes: the fields that are there."""

    name: str
    scopes: Sequence[Scope]
    expires_at: datetime | None
    limits: Mapping[str, int | None]


class Keys:
    """All API keys. Thread-safe; other processes may write the same tables.

    `keyed` is the path of a file that is created with the first key: `server.storage.home.Home.keyed`.

    In all methods `who` is for the audit log. If a `manager` is given, other projects' keys and the operator's
    seem not to exist, and the rules of `server.access.managers` hold for what it makes and changes. Forbidden is
    raised if its key is no longer valid, or no longer has the scope `manage`.
    """

    def __init__(self, engine: sa.Engine, keyed: Path) -> None:
        self._engine = engine
        self._beside = without_writers_lock(engine, is_losable=True)
        self._keyed = keyed
        self._reader = reader_of(engine)

    def create(
        self,
        name: str,
        *,
        who: str,
        project: str = DEFAULT_PROJECT,
        scopes: Sequence[Scope] = DEFAULT_SCOPES,
        expires_at: datetime | None = None,
        quota: Quota | None = None,
        manager: Principal | None = None,
        deliver: Callable[["ApiKey", str], None] = lambda key, secret: None,
    ) -> tuple[ApiKey, str]:
        """Create a key, and its project if that doesn't exist. Return the key and its secret, which isn't stored.

        `deliver` is called with the key and the secret before anything is stored; if it raises, no key is created.
        Raise InvalidInput if a field is invalid, and Forbidden if the manager can't give the scopes or project.
        """
        now = datetime.now(UTC)
        kept = tuple(scope for scope in SCOPES if scope in scopes)
        key_id = f"key-{secrets.token_hex(8)}"
        key = ApiKey(key_id, name, project, kept, now, _in_utc(expires_at), None, None, quota or Quota())
        _check(key, scopes, now)
        secret = PREFIX + secrets.token_urlsafe(32)
        values = {field: getattr(key, field) for field in ("id", "name", "project", "created_at", "expires_at")}
        values |= {"scopes": list(kept), "secret_digest": digest_of(secret), **asdict(key.quota)}

        def work(connection: sa.Connection) -> None:
            require_manager(connection, manager)
            if manager is not None:
                _check_managed(connection, manager, key, asdict(key.quota))
                _refuse_too_many(connection, manager.project)
            ensure(connection, project)
            connection.execute(sa.insert(api_keys).values(values))
            changed(connection)
            record(connection, who, "key.create", project, key.id, {"name": name, "scopes": list(kept)})

        deliver(key, secret)
        if not self._keyed.exists():  # before the key: if the database is lost, access must not become anonymous
            with new_file(self._keyed):
                pass
        transact(self._engine, work)
        return key, secret

    def list(self, project: str | None = None, manager: Principal | None = None) -> list[ApiKey]:
        """Return all keys, or those of `project`, the oldest first. Revoked and expired keys are included."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if project is not None:
            query = query.where(api_keys.c.project == project)
        with self._reader.connect() as connection:
            found = [_key(row) for row in connection.execute(query).mappings()]
        return [key for key in found if manages(manager, key.project, key.scopes)]

    def operators(self) -> set[str]:
        """Return the ids of the keys that managers can't see in any project: those with an operator's scope."""
        return {key.id for key in self.list() if not set(key.scopes).isdisjoint(OPERATORS_SCOPES)}

    def get(self, key_id: str, manager: Principal | None = None) -> ApiKey:
        """Return the key. Raise NotFound if there is no such key."""
        with self._reader.connect() as connection:
            return _get(connection, key_id, manager)

    def change(self, key_id: str, changes: KeyChanges, *, who: str, manager: Principal | None = None) -> ApiKey:
        """Change the given fields of a key. If all of them have these values already, nothing is recorded.

        Raise NotFound if there is no such key, Conflict if it is revoked, InvalidInput if a field is invalid, and
        Forbidden if the manager can't give the scopes.
        """

        def work(connection: sa.Connection) -> ApiKey:
            require_manager(connection, manager)
            key, limits = _get(connection, key_id, manager), changes.get("limits", {})
            if key.revoked_at is not None:
                raise Conflict(f"the key {key_id} is permanently revoked: create another key")
            scopes = changes.get("scopes", key.scopes)
            new = replace(
                key,
                name=changes.get("name", key.name),
                scopes=tuple(scope for scope in SCOPES if scope in scopes),
                expires_at=_in_utc(changes.get("expires_at", key.expires_at)),
                quota=key.quota.with_limits(limits),
            )
            _check(new, scopes, datetime.now(UTC) if "expires_at" in changes else None)
            if manager is not None:
                _check_managed(connection, manager, new, limits, is_grant=_grants(key, new))
            if new == key:
                return key
            values: dict[str, object] = {
                "name": new.name,
                "scopes": list(new.scopes),
                "expires_at": new.expires_at,
            }
            mine = api_keys.c.id == key_id
            connection.execute(sa.update(api_keys).where(mine).values(values | asdict(new.quota)))
            changed(connection)
            document = new.to_document()
            given = [*(field for field in changes if field != "limits"), *limits]
            record(connection, who, "key.change", key.project, key_id, {field: document[field] for field in given})
            return new

        return transact(self._engine, work)

    def by_digest(self) -> dict[str, ApiKey]:
        """Return all keys by their secrets' digests."""
        with self._reader.connect() as connection:
            rows = connection.execute(sa.select(api_keys)).mappings()
            return {row["secret_digest"]: _key(row) for row in rows}

    def revoke(self, key_id: str, *, who: str, manager: Principal | None = None) -> ApiKey:
        """Revoke the key. Repeated calls have no effect. Raise NotFound if there is no such key."""

        def work(connection: sa.Connection) -> ApiKey:
            require_manager(connection, manager)
            key = _get(connection, key_id, manager)
            if key.revoked_at is not None:
                return key
            revoked = sa.update(api_keys).where(api_keys.c.id == key_id).values(revoked_at=datetime.now(UTC))
            connection.execute(revoked)
            changed(connection)
            record(connection, who, "key.revoke", key.project, key_id, {"name": key.name})
            return _get(connection, key_id)

        return transact(self._engine, work)

    def used(self, last: Mapping[str, datetime]) -> None:
        """Store the time of each key's last use. `last` has these times by key id.

        A key that another transaction is changing is left out: its next use will be stored.
        """

        def work(connection: sa.Connection) -> None:
            mine = sa.select(api_keys.c.id).where(api_keys.c.id.in_(last)).with_for_update(skip_locked=True)
            rows = [{"mine": key_id, "at": last[key_id]} for key_id in connection.execute(mine).scalars().all()]
            if rows:
                stored = sa.update(api_keys).where(api_keys.c.id == sa.bindparam("mine"))
                connection.execute(stored.values(last_used_at=sa.bindparam("at")), rows)

        transact(self._beside, work)

    def are_there(self) -> bool:
        """Return whether a key was ever created. If so, clients need a key."""
        if self._keyed.exists():
            return True
        with self._reader.connect() as connection:
            are_there = connection.execute(sa.select(api_keys.c.id).limit(1)).first() is not None
        if are_there:  # another server made it; if the database is lost, this server must still ask for keys
            with suppress(OSError), new_file(self._keyed):
                pass
        return are_there


def _in_utc(moment: datetime | None) -> datetime | None:
    try:
        return None if moment is None else moment.astimezone(UTC)
    except OverflowError:
        raise InvalidInput.of("expires_at", "is beyond the year 9999: leave it out") from None


def _check(key: ApiKey, scopes: Sequence[str], now: datetime | None) -> None:
    """Raise InvalidInput if fields of a new or changed key are invalid.

    `scopes` are those that were asked for. `now` is None if the key's expiry doesn't change.
    """
    faults = []
    if not is_name(key.name):
        faults.append(FieldError(("name",), NAME_RULE))
    if fault := project_fault(key.project):
        faults.append(FieldError(("project",), fault))
    if not scopes or any(scope not in SCOPES for scope in scopes):
        faults.append(FieldError(("scopes",), f"must be one or more of {', '.join(SCOPES)}"))
    if key.project != DEFAULT_PROJECT and (beyond := [scope for scope in OPERATORS_SCOPES if scope in scopes]):
        advice = "; give manage to administer one project" if "admin" in beyond else ""
        verb = "is" if len(beyond) == 1 else "are"
        message = f"{' and '.join(beyond)} {verb} for keys of the project {DEFAULT_PROJECT} alone{advice}"
        faults.append(FieldError(("scopes",), message))
    if "manage" in scopes and key.quota != Quota():  # other keys could be made without the limits
        names = [name for name in LIMITS if getattr(key.quota, name) is not None]
        message = "can't be a limit of a key with the scope manage: limit its project"
        faults += [FieldError((name,), message) for name in names]
    if now is not None and key.expires_at is not None and key.expires_at <= now:
        faults.append(FieldError(("expires_at",), "must be in the future"))
    if faults:
        raise InvalidInput(faults)


def _check_managed(
    connection: sa.Connection,
    manager: Principal,
    key: ApiKey,
    limits: Mapping[str, int | None],
    is_grant: bool = True,
) -> None:
    """Raise Forbidden or InvalidInput if the manager can't make the key as it is, with these limits.

    `is_grant` is false if an existing key gets no more scopes and no later end.
    """
    if is_grant:
        own = sa.select(api_keys.c.expires_at).where(api_keys.c.id == manager.key_id)
        latest_end = connection.execute(own).scalar_one_or_none()
        check_grant(manager, key.project, key.scopes, key.expires_at, latest_end)
    if faults := list(exceeding(limits, manager.project_quota, "the project's limit")):
        raise InvalidInput(faults)


def _grants(old: ApiKey, new: ApiKey) -> bool:
    """Return whether a changed key has more scopes than before, or ends later."""
    if not set(new.scopes) <= set(old.scopes):
        return True
    return old.expires_at is not None and (new.expires_at is None or new.expires_at > old.expires_at)


def _refuse_too_many(connection: sa.Connection, project: str) -> None:
    """Raise LimitReached if the project has MAX_MANAGED keys: then only the operator may make more."""
    query = sa.select(sa.func.count()).where(api_keys.c.project == project)
    if (number := connection.execute(query).scalar_one()) >= MAX_MANAGED:
        raise LimitReached(f"the project has {number:,} keys, with those revoked: ask the operator for more")


def _get(connection: sa.Connection, key_id: str, manager: Principal | None = None) -> ApiKey:
    row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).mappings().first()
    if row is None or not manages(manager, row["project"], row["scopes"]):
        hint = Hint("list_keys", "GET /keys lists them")
        raise NotFound(f"there is no key {key_id}: {hint}", hint=hint)
    return _key(row)


def _key(row: sa.RowMapping) -> ApiKey:
    same = ("id", "name", "project", "created_at", "expires_at", "revoked_at", "last_used_at")
    return ApiKey(**{name: row[name] for name in same}, scopes=tuple(row["scopes"]), quota=quota_of(row))


WATCH_SECONDS = 0.1
"""The time between two checks for changes."""

KeyFault = Literal["missing", "unknown", "expired", "revoked"]


@dataclass(frozen=True)
class _Remembered:
    """The database's keys and quotas. If its count of their changes is still `number`, they are up to date."""

    number: int | None
    by_digest: Mapping[str, ApiKey]
    are_there: bool
    quotas: Mapping[str, Quota]


class KeyRing:
    """A cache of the database's keys, which finds the principal for a secret.

    `commits` is a cheap function that returns another number after every commit. `changes` returns another number
    after a change of keys or projects; it is `commits` by default. `fixed` is the setting API_KEYS, the operator's
    keys. With `allow_guests`, a client without a key is a `GUEST` even if there are keys. If `is_remote`, the
    database is read in threads. While it doesn't answer, `outage` says for how long the cache is used as it is.
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
        outage: Outage | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._projects = projects
        self._commits = commits
        self._changes = changes or commits
        self._is_remote = is_remote
        self._outage = outage or Outage()
        self._clock = clock
        self._current_at = -math.inf  # the last time at which the cache was up to date
        self._operator = OperatorKeys(fixed)
        self._fixed: dict[str, Principal] = {}
        self._allow_guests = allow_guests
        self._now = now
        self._seen: int | None = None  # the last value of `commits`
        self._known = _Remembered(None, {}, True, {})
        self._by_id: Mapping[str, ApiKey] = {}
        self._reading = asyncio.Lock()
        self._thread: CapacityLimiter | None = None  # its own: other work may hold all default threads for long
        self._num_asked = self._num_answered = 0
        self._fault: Unavailable | None = None
        self._used: dict[str, datetime] = {}
        self._ends: dict[str, asyncio.Future[None]] = {}
        self._read_operators_keys(always=True)

    @property
    def has_keys(self) -> bool:
        """Return whether a key was ever created, or API_KEYS has a key. Revoked and expired keys count."""
        return self._operator.are_given or self._known.are_there

    @property
    def anonymous(self) -> Principal | None:
        """Return the principal of clients without a key, or None if clients need a key."""
        if self._allow_guests:
            return self._limited(GUEST)
        return None if self.has_keys else self._limited(EVERYBODY)

    async def refresh(self) -> None:
        """Bring the cache up to date with the database, and with the file of keys that API_KEYS may name.

        Raise Unavailable if the database can't be read.
        """
        self._read_operators_keys()
        if (seen := self._commits()) == self._seen:
            self._current_at = self._clock()
            return
        if not self._is_remote and self._changes() == self._known.number:
            self._seen = seen
            return
        self._num_asked += 1
        own = self._num_asked
        async with self._reading:
            if self._num_answered < own:  # no other request has read since
                num_asked, seen = self._num_asked, self._commits()
                if self._thread is None:
                    self._thread = CapacityLimiter(1)
                try:
                    self._take(await to_thread.run_sync(self._read, limiter=self._thread), seen)
                    self._fault = None
                except Unavailable as error:
                    self._fault = error
                    num_asked = self._num_asked  # else requests that came meanwhile would wait as long again
                self._num_answered = num_asked
            if self._fault is not None:
                raise self._fault

    async def reload(self) -> None:
        """Read the file of operator's keys again, even if it seems unchanged, and log the number of its keys."""
        self._read_operators_keys(always=True)
        await self.refresh()
        log.info("reloaded: SMOLORA_API_KEYS has %s", plural(len(self._fixed), "valid key"))

    def refresh_now(self) -> None:
        """Bring the cache up to date. This blocks the caller's thread."""
        if (seen := self._commits()) != self._seen:
            self._take(self._read(), seen)

    def _read_operators_keys(self, always: bool = False) -> None:
        if not (self._operator.refresh(always) or always):
            return
        digests = map(digest_of, self._operator.secrets)
        self._fixed = {digest: _of_setting(digest) for digest in digests}
        for key_id in list(self._ends):
            self._end_if_invalid(key_id)

    def _read(self) -> _Remembered:
        """Read keys and projects again if any has changed. This may run in any thread."""
        if (number := self._changes()) == self._known.number:
            return self._known
        quotas = {project.name: project.quota for project in self._projects.list()}
        return _Remembered(number, self._keys.by_digest(), self._keys.are_there(), quotas)

    def _take(self, read: _Remembered, seen: int) -> None:
        self._seen = seen
        self._current_at = self._clock()
        if read is self._known:
            return
        self._known = read
        self._by_id = {key.id: key for key in read.by_digest.values()}
        for key_id in list(self._ends):
            self._end_if_invalid(key_id)

    async def principal(self, secret: str | None, *, at_any_age: bool = False) -> Principal | None:
        """Return the principal of a client, or None if the client is refused.

        `secret` is what the client sent as its key, or None if it sent none. Raise Unavailable if the database
        can't be read, unless the cache isn't too old. If `at_any_age`, it never is.
        """
        await self._refresh_if_possible(math.inf if at_any_age else self._outage.keys)
        if secret is None:
            return self.anonymous
        digest = digest_of(secret)
        for known, principal in self._fixed.items():
            if hmac.compare_digest(digest, known):
                return self._limited(principal)
        # a lookup by the digest of 256 random bits: its time reveals nothing of any secret
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
        # before the first key, clients send placeholders such as "unused"
        return None if self.has_keys else self.anonymous

    async def _refresh_if_possible(self, max_age: float) -> None:
        """Refresh the cache. If the database doesn't answer, and the cache is at most `max_age` s old, keep it."""
        if not (self._outage.is_on and self._clock() - self._current_at <= max_age):
            try:
                await self.refresh()
            except Unavailable:
                if self._clock() - self._current_at > max_age:
                    raise
        else:
            self._read_operators_keys()

    def fault_of(self, secret: str | None) -> KeyFault:
        """Return why a secret for which `principal` returned None is refused."""
        if secret is None:
            return "missing"
        if (key := self.key_of(secret)) is None:
            return "unknown"
        return "expired" if key.revoked_at is None else "revoked"

    def key_of(self, secret: str) -> ApiKey | None:
        """Return the stored key with this secret, valid or not. None if there is none, or if API_KEYS has it."""
        return self._known.by_digest.get(digest_of(secret))

    def with_id(self, key_id: str) -> ApiKey | None:
        """Return the stored key with this id, valid or not, or None if there is none."""
        return self._by_id.get(key_id)

    def within(self, principal: Principal, project: str) -> Principal | None:
        """Return the operator's `principal` restricted to one project, or None if there is no such project.

        The result sees only the adapters that the project's own keys see.
        """
        if project not in self._known.quotas and project != DEFAULT_PROJECT:
            return None
        return replace(
            principal, project=project, project_quota=self._known.quotas.get(project, Quota()), sees_all=False
        )

    def end_of(self, principal: Principal) -> "asyncio.Future[None]":
        """Return a future that is done when the principal's key is revoked or expires."""
        key_id = principal.key_id
        if (end := self._ends.get(key_id)) is None:
            end = self._ends[key_id] = asyncio.get_running_loop().create_future()
            self._end_if_invalid(key_id)
        return end

    def take_used(self) -> dict[str, datetime]:
        """Return, by key id, when each key was last used, for the keys used since the last `take_used`."""
        used, self._used = self._used, {}
        return used

    def give_back(self, used: Mapping[str, datetime]) -> None:
        """Return to the cache the times from `take_used` that the caller couldn't store."""
        self._used = {**used, **self._used}

    async def watch(self) -> None:
        """Refresh the cache regularly until cancelled: open streams and /ready need it even between requests."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            with suppress(Unavailable, SQLAlchemyError, OSError):  # the next check may succeed
                await self.refresh()
            for key_id in list(self._ends):
                self._end_if_invalid(key_id)

    def _end_if_invalid(self, key_id: str) -> None:
        if key_id.startswith(OF_SETTING):
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
    """Return the principal of a key in API_KEYS. The principal's key id contains the start of the key's digest."""
    return Principal(DEFAULT_PROJECT, f"{OF_SETTING}{digest[:12]}", frozenset(SCOPES), sees_all=True)
