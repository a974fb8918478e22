"""Settings that protect the server under load and attack; `server.config.Settings` inherits them."""

from pydantic import BaseModel, ByteSize, Field


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
