"""Settings that protect the server under load and attack; `server.config.Settings` inherits them.

Settings of many machines; `server.config.WorkerSettings` inherits them.

obstore itself reads an object store's credentials, region and endpoint from the usual AWS_ variables.

What a setting may be, in the place of what pydantic says of one that isn't: a pattern, say.
"""

import re

from pydantic import BaseModel, ByteSize, Field, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings


class Limits(BaseModel):
    """Limits of connections, requests and disk space. Times are seconds."""

    max_connections: int = Field(
        default=1024,
        ge=1,
        le=100_000,
        description="Open connections. Beyond that the longest idle one is closed, or the new one if none is "
        "idle. It is lowered, with a warning at start, if ulimit -n doesn't allow that many and 512 other files.",
    )
    header_timeout: float = Field(
        default=10,
        gt=0,
        le=3600,
        description="Seconds within which a connection's first headers must be complete, and those of each later "
        "request from its first byte on; else the connection is closed.",
    )
    body_timeout: float = Field(
        default=30,
        gt=0,
        le=3600,
        description="Seconds within which the next 16 KiB of a request's body, or its end, must arrive; else 408.",
    )
    stall_timeout: float = Field(
        default=30,
        gt=0,
        le=3600,
        description="Seconds after which a client that reads nothing of its answer is cut off. One that reads "
        "too slowly is cut off, too, if more than 262,144 tokens and log-probabilities wait for it: its stream "
        "ends with an error.",
    )
    request_timeout: float = Field(
        default=600,
        gt=0,
        le=86_400,
        description="Seconds from a generation's acceptance to its last token; then event: error, or 503 if "
        "nothing was sent. An import from the hub may take as long.",
    )
    queue_timeout: float = Field(
        default=10,
        gt=0,
        le=86_400,
        description="Seconds. A request that would wait longer for a place in the batch, by the measured rate, "
        "gets 429 with Retry-After at once; a project waits for its own turns alone. Work that waits longer for "
        "a thread of a lane gets 429, too.",
    )
    min_free_bytes: ByteSize = Field(
        default=ByteSize(512 << 20),
        description="Free space on HOME's disk below which uploads and jobs get 503; 0: no limit. Uploads in "
        "flight count by their announced size, and each checks again every 16 MiB.",
    )


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


_KINDS = {
    "bool_parsing": "must be 1 or 0",
    "byte_size": "must be a number of bytes, such as 2GiB",
    "byte_size_unit": "must be a number of bytes, such as 2GiB",
    "float_parsing": "must be a number",
    "int_parsing": "must be a whole number",
}
_SHAPES = {
    "device": "must be auto, cpu, cuda or cuda:N",
    "public_url": "must be like https://lora.example.org/lora, with no / at its end",
    "root_path": "must be like /smolora, with a / before it and none at its end",
}
"""Of what has a pattern."""


def in_words(fault: ErrorDetails) -> str:
    """For a person, in less than a line."""
    if fault["type"] == "int_parsing" and str(fault["input"]).startswith("tcp://"):
        return "is a service's address, by Kubernetes: set enableServiceLinks: false for the pod, or the port here"
    if fault["type"] == "string_pattern_mismatch":
        return _SHAPES.get(str(fault["loc"][0]), fault["msg"])
    return _KINDS.get(fault["type"], fault["msg"])
