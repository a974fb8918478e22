"""API keys: made once, stored as digests, revoked for good. Every change is one transaction with its audit entry.

A secret has 256 random bits, so that its plain SHA-256 can't be searched: a slow hash would protect nothing more.
"""

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from adapters.catalog.tables import transact, transacted
from adapters.durable import new_file
from adapters.errors import FieldError, InvalidInput, NotFound
from adapters.names import NAME_RULE, is_name
from adapters.viewpoint import DEFAULT_PROJECT, project_fault
from server.access.audit import record
from server.access.principal import DEFAULT_SCOPES, SCOPES, Quota, Scope
from server.access.projects import ensure, quota_of
from server.access.tables import api_keys, changed

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

    `keyed` is the file that says that there once was one: `server.home.Home.keyed`.
    """

    def __init__(self, engine: sa.Engine, keyed: Path) -> None:
        self._engine = engine
        self._keyed = keyed
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT")

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
