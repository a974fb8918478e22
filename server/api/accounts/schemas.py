"""What /keys, /projects, /usage and /audit take and answer."""

from datetime import date, datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema

from adapters.names import MAX_NAME, NAME, NAME_RULE, is_name
from adapters.viewpoint import DEFAULT_PROJECT
from server.access.principal import DEFAULT_SCOPES, Quota, Scope
from server.api.schemas import Body

_NAME = rf"^{NAME.pattern}$"
_MOST = (1 << 53) - 1  # what JavaScript's numbers hold

Limit = Annotated[int, Field(ge=1, le=_MOST)]


def _name(given: str) -> str:
    if not is_name(given):
        raise ValueError(NAME_RULE)
    return given


Name = Annotated[
    str,
    AfterValidator(_name),
    WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_NAME, "pattern": _NAME}),
]


class LimitFields(Body):
    """What a key may, or a project's keys together. Null: no limit."""

    requests_per_minute: Limit | None = Field(None, description="requests other than GET")
    tokens_per_minute: Limit | None = Field(None, description="of prompts, and of answers as long as they may be")
    max_jobs: Limit | None = Field(None, description="that haven't ended")
    max_bytes: Limit | None = Field(None, description="stored: adapters, data sets and files")

    @property
    def quota(self) -> Quota:
        return Quota(**{name: getattr(self, name) for name in LimitFields.model_fields})


class KeyBody(LimitFields):
    """POST /keys."""

    name: Name = Field(description="for people")
    project: Name | None = Field(
        None, description=f"created if there is none; default: what OpenAI-Project names, else {DEFAULT_PROJECT}"
    )
    scopes: list[Scope] = Field(list(DEFAULT_SCOPES), min_length=1, max_length=4)
    expires_at: Annotated[datetime, Field(strict=False)] | None = Field(
        None, description="with an offset from UTC"
    )


class KeyAnswer(BaseModel):
    id: str
    name: str
    project: str
    scopes: list[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_jobs: int | None
    max_bytes: int | None


class NewKeyAnswer(KeyAnswer):
    secret: str = Field(description="told once: what is stored is its digest")


class KeyList(BaseModel):
    keys: list[KeyAnswer]


class ProjectBody(LimitFields):
    """PUT /projects/{project}: its limits, in the place of all that it had."""


class ProjectAnswer(BaseModel):
    name: str
    created_at: datetime
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_jobs: int | None
    max_bytes: int | None


class ProjectList(BaseModel):
    projects: list[ProjectAnswer]


class UsageRow(BaseModel):
    """With the field that `by` names, if it does."""

    project: str | None = None
    key: str | None = None
    adapter: str | None = None
    day: date | None = None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    trained_tokens: int
    job_seconds: float


class UsageAnswer(BaseModel):
    rows: list[UsageRow]


class AuditEntry(BaseModel):
    number: int
    at: datetime
    who: str = Field(description="a key's id; or command-line, anonymous, or env-… for one of SMOLORA_API_KEYS")
    action: str
    project: str
    target: str
    detail: dict[str, object]


class AuditList(BaseModel):
    entries: list[AuditEntry]
    next: int | None = Field(description="pass it as `before` for older ones")
