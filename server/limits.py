"""Settings that hold the server upright under load and attack; `server.config.Settings` has them among its own."""

from pydantic import BaseModel, ByteSize, Field


class Limits(BaseModel):
    """Times are seconds."""

    max_connections: int = Field(
        default=1024, ge=1, le=100_000, description="Open connections; past it the longest idle one is closed."
    )
    header_timeout: float = Field(
        default=10, gt=0, le=3600, description="Seconds until a request's headers must be complete."
    )
    body_timeout: float = Field(
        default=30, gt=0, le=3600, description="Seconds without progress (16 KiB, or the end) of a request's body."
    )
    stall_timeout: float = Field(
        default=30,
        gt=0,
        le=3600,
        description="Seconds after which a reader that takes nothing is cut off.",
    )
    request_timeout: float = Field(
        default=600,
        gt=0,
        le=86_400,
        description="Seconds from a generation's acceptance to its last token, and of an import from the hub.",
    )
    queue_timeout: float = Field(
        default=10,
        gt=0,
        le=86_400,
        description="Seconds: what would wait longer for a place in the batch, by the measured rate, is refused.",
    )
    min_free_bytes: ByteSize = Field(
        default=ByteSize(512 << 20),
        description="Free space on HOME's disk, such as 512MiB, below which uploads and jobs are refused.",
    )
