"""What /adapters answers. The classes document what is built by hand."""

from typing import Literal

from pydantic import BaseModel, Field

from server.api.schemas import UsedAdapter


class VersionAnswer(BaseModel):
    name: str
    version: int
    kind: Literal["adapter", "composition"]
    digest: str
    parts: list[UsedAdapter] | None = Field(None, description="of a composition: flattened, pinned to versions")
    rank: int = Field(description="of a composition: its parts' together")
    alpha: float | None = Field(description="null for a composition")
    target_modules: list[str]
    parameters: int
    bytes: int = Field(description="as stored; a composition takes none")
    base_model: str | None = Field(description="as its configuration names it")
    base_digest: str | None = Field(description="of the base that it was trained on, or uploaded for")
    data_digest: str | None = Field(description="of the rows that it was trained on")
    config: dict[str, object] = Field(description="its shape, and how it was made")
    metrics: dict[str, float]
    parent: str | None = Field(description="what it was made from, pinned to versions")
    job_id: str | None
    created_at: str
    resident: bool = Field(description="in the engine's memory now")
    warnings: list[str] = Field(description="such as that it was made on another base; most have none")


class AdapterAnswer(BaseModel):
    name: str
    kind: Literal["adapter", "composition"]
    latest: int
    visibility: Literal["public", "private"] = Field(description="public: other projects may use it")
    aliases: dict[str, int] = Field(description="all but latest")
    parts: list[UsedAdapter] | None = Field(None, description="of a composition: its latest version's")
    versions: list[VersionAnswer]
    resident: bool


class AdapterList(BaseModel):
    adapters: list[AdapterAnswer]
    next: str | None = Field(description="pass it as `after` for the next page")
