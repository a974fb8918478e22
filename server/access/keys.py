"""API keys: made once, stored as digests, revoked for good. Every change is one transaction with its audit entry.

A secret has 256 random bits, so that its plain SHA-256 can't be searched: a slow hash would protect nothing more.

The keys as a running server remembers them: a request costs one look at a counter, not a query.

The counter is the database's own, which any commit of another connection moves; then `access_changes` says whether
keys or projects did. So a key that was revoked, here or by a command on HOME, opens nothing from the next request
on, and whoever is being answered is told within `WATCH_SECONDS`. Of a database elsewhere other servers hear within
milliseconds; one that knows no key for a secret asks before it says so. Everything here is for one event loop,
which waits neither for a database elsewhere nor while all keys are read: threads do that, for all requests that
wait at once.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from anyio import CapacityLimiter, to_thread
from sqlalchemy.exc import SQLAlchemyError

from adapters.errors import FieldError, InvalidInput, NotFound, Unavailable
from adapters.names import DEFAULT_PROJECT, NAME_RULE, is_name, project_fault
from adapters.sql import reader_of, transact, transacted
from adapters.storage.durable import new_file
from server.access.audit import record
from server.access.principal import DEFAULT_SCOPES, EVERYBODY, GUEST, SCOPES, Principal, Quota, Scope
from server.access.projects import Projects, ensure, quota_of
from server.access.tables import api_keys, changed
from server.config.operator_keys import OperatorKeys

PREFIX = "sk-smolora-"


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; its secret isn't."""

    id: str
    name: str
    project: str
    scopes: tuple[Scope, ...]
    created_at: datetime  # in UTC, as the others
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    quota: Quota

    def to_document(self) -> dict[str, object]:
        """JSON-ready, its limits beside the rest."""
        fields = asdict(self)
        limits = fields.pop("quota")
        shown = {name: v.isoformat() if isinstance(v, datetime) else v for name, v in fields.items()}
        return {**shown, "scopes": list(self.scopes), **limits}

    def is_valid(self, now: datetime) -> bool:
        """Whether it opens anything at that moment."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def digest_of(secret: str) -> str:
    """What is stored in the secret's place: its SHA-256 (hex)."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """All keys. Thread-safe; other processes may write the same tables.

    `keyed` is the file that says that there once was one: `server.storage.home.Home.keyed`.
    """

    def __init__(self, engine: sa.Engine, keyed: Path) -> None:
        self._engine = engine
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
        deliver: Callable[["ApiKey", str], None] = lambda key, secret: None,
    ) -> tuple[ApiKey, str]:
        """A new key and its secret, which can't be asked for again; its project comes to be if there is none.

        `deliver` is given both before anything is stored: where it raises, there is no key. Raises InvalidInput on
        whatever is wrong with a field.
        """
        now = datetime.now(UTC)
        expires_at = _in_utc(expires_at)
        _check(name, project, scopes, expires_at, now)
        secret = PREFIX + secrets.token_urlsafe(32)
        kept = tuple(scope for scope in SCOPES if scope in scopes)
        key_id = f"key-{secrets.token_hex(8)}"
        key = ApiKey(key_id, name, project, kept, now, expires_at, None, None, quota or Quota())
        values = {field: getattr(key, field) for field in ("id", "name", "project", "created_at", "expires_at")}
        values |= {"scopes": list(kept), "secret_digest": digest_of(secret), **asdict(key.quota)}

        def work(connection: sa.Connection) -> None:
            ensure(connection, project)
            connection.execute(sa.insert(api_keys).values(values))
            changed(connection)
            record(connection, who, "key.create", project, key.id, {"name": name, "scopes": list(kept)})

        deliver(key, secret)
        if not self._keyed.exists():  # before the key: a lost database must not let strangers in
            with new_file(self._keyed):
                pass
        transact(self._engine, work)
        return key, secret

    def list(self, project: str | None = None) -> list[ApiKey]:
        """All keys, or a project's, the oldest first; those that were revoked or have expired, too."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        if project is not None:
            query = query.where(api_keys.c.project == project)
        with self._reader.connect() as connection:
            return [_key(row) for row in connection.execute(query).mappings()]

    def by_digest(self) -> dict[str, ApiKey]:
        """All of them, by what is stored in their secrets' place."""
        with self._reader.connect() as connection:
            rows = connection.execute(sa.select(api_keys)).mappings()
            return {row["secret_digest"]: _key(row) for row in rows}

    def revoke(self, key_id: str, *, who: str) -> ApiKey:
        """From now on it opens nothing; twice is once. Raises NotFound."""

        def work(connection: sa.Connection) -> ApiKey:
            mine = api_keys.c.id == key_id
            row = connection.execute(sa.select(api_keys).where(mine)).mappings().first()
            if row is None:
                raise NotFound(f"there is no key {key_id}: GET /keys lists them")
            if row["revoked_at"] is None:
                connection.execute(sa.update(api_keys).where(mine).values(revoked_at=datetime.now(UTC)))
                changed(connection)
                record(connection, who, "key.revoke", row["project"], key_id, {"name": row["name"]})
            return _key(connection.execute(sa.select(api_keys).where(mine)).mappings().one())

        return transact(self._engine, work)

    @transacted
    def used(self, connection: sa.Connection, last: Mapping[str, datetime]) -> None:
        """Store when keys were used last, by id."""
        for key_id, at in last.items():
            connection.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(last_used_at=at))

    def are_there(self) -> bool:
        """Whether a key was ever made: then nobody comes in without one any more."""
        if self._keyed.exists():
            return True
        with self._reader.connect() as connection:
            are_there = connection.execute(sa.select(api_keys.c.id).limit(1)).first() is not None
        if are_there:  # another server's: should the database be lost, this one keeps strangers out, too
            with suppress(OSError), new_file(self._keyed):
                pass
        return are_there


def _in_utc(moment: datetime | None) -> datetime | None:
    try:
        return None if moment is None else moment.astimezone(UTC)
    except OverflowError:
        raise InvalidInput.of("expires_at", "is beyond the year 9999: leave it out") from None


def _check(name: str, project: str, scopes: Sequence[Scope], expires_at: datetime | None, now: datetime) -> None:
    faults = []
    if not is_name(name):
        faults.append(FieldError(("name",), NAME_RULE))
    if fault := project_fault(project):
        faults.append(FieldError(("project",), fault))
    if not scopes or any(scope not in SCOPES for scope in scopes):
        faults.append(FieldError(("scopes",), f"must be one or more of {', '.join(SCOPES)}"))
    if "metrics" in scopes and project != DEFAULT_PROJECT:  # they name the adapters of all projects
        faults.append(FieldError(("scopes",), f"metrics is for keys of the project {DEFAULT_PROJECT} alone"))
    if expires_at is not None and expires_at <= now:
        faults.append(FieldError(("expires_at",), "must be in the future"))
    if faults:
        raise InvalidInput(faults)


def _key(row: sa.RowMapping) -> ApiKey:
    same = ("id", "name", "project", "created_at", "expires_at", "revoked_at", "last_used_at")
    return ApiKey(**{name: row[name] for name in same}, scopes=tuple(row["scopes"]), quota=quota_of(row))


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
