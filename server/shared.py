"""Settings of many machines; `server.config.WorkerSettings` inherits them.

obstore itself reads an object store's credentials, region and endpoint from the usual AWS_ variables.
"""

import re

from pydantic import BaseModel, ByteSize, Field, field_validator
from pydantic_settings import BaseSettings

_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.=-]+)*/?|file:///[^\s?#]+", re.ASCII)


class SharedSettings(BaseModel):
    """Where machines share their bytes."""

    bytes_url: str | None = Field(
        default=None,
        max_length=1024,
        description="Where adapters, data sets, files and jobs are stored instead of in HOME, which becomes a "
        "cache: s3://bucket/prefix, or file:///directory of a shared file system. Needs the extra cluster. "
        "Default: in HOME.",
    )
    bytes_cache: ByteSize = Field(
        default=ByteSize(16 << 30),
        ge=1 << 20,
        description="Space under HOME for copies of adapters if BYTES_URL is set.",
    )

    @field_validator("bytes_url", mode="after")
    @classmethod
    def _place(cls, value: str | None) -> str | None:
        if value is not None and not _URL.fullmatch(value):  # which may have a secret in it
            raise ValueError("must be like s3://bucket/prefix or file:///directory; keys are AWS_ variables")
        return value


class Transport(BaseSettings):
    """Whether credentials may go over connections that aren't encrypted, as AWS_ALLOW_HTTP says."""

    allow_http: bool = Field(default=False, validation_alias="AWS_ALLOW_HTTP")
