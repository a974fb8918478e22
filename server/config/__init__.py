"""Every setting of the server, from `SMOLORA_` environment variables and from `serve`'s flags.

The command line builds the settings once, with a flag for each field, and passes them to all other code, which
reads no settings from the environment. A flag overrides its variable, and an empty variable counts as unset.
`server.model` and `server.engine` decide what `auto` and None mean on the machine's hardware. `--help` and
docs/settings.md show the fields' descriptions.
"""

import ipaddress
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.config import operator_keys
from server.errors import StartupError
from server.telemetry.logs import LogFormat

PREFIX = "SMOLORA_"
DEFAULT_MODEL = "smollm2-135m-instruct"

_TRAIN_MEMORY = 0.5  # share of a GPU's memory; the server has the rest
_SWITCHES = {"true": "1", "yes": "1", "on": "1", "false": "0", "no": "0", "off": "0"}
_BYTES_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.=-]+)*/?|file:///[^\s?#]+", re.ASCII)
_HOST = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*|[0-9a-fA-F:.]+", re.ASCII)
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#]+", re.ASCII | re.IGNORECASE)

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Anonymous = Literal["0", "1", "until-keyed"]
Flag = str | int | float | bool | Path | None

_MESSAGES = {
    "bool_parsing": "must be 1 or 0",
    "byte_size": "must be a number of bytes, such as 2GiB",
    "byte_size_unit": "must be a number of bytes, such as 2GiB",
    "float_parsing": "must be a number",
    "int_parsing": "must be a whole number",
}
_PATTERN_MESSAGES = {
    "device": "must be auto, cpu, cuda or cuda:N",
    "public_url": "must be like https://lora.example.org/lora, with no / at its end",
    "root_path": "must be like /smolora, with a / before it and none at its end",
}


class Limits(BaseModel):
    """Limits on connections, requests and disk space. Times are in seconds."""

    max_connections: int = Field(
        default=1024,
        ge=1,
        le=100_000,
        description="Open connections. Beyond that the longest idle one is closed, or the new one if none is "
        "idle. A project may have three quarters of this many requests at once. It is lowered, with a warning at "
        "start, if ulimit -n doesn't allow that many and 512 other files.",
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
        description="Seconds from a generation's acceptance to its last token; then event: error, or 504 if "
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


class StorageSettings(BaseModel):
    """The object store or file system in which several machines share adapters, data sets, files and jobs.

    The library obstore reads an object store's credentials, region and endpoint from the usual AWS_ variables.
    """

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
        if value is not None and not _BYTES_URL.fullmatch(value):  # the value may contain a secret: don't quote it
            raise ValueError("must be like s3://bucket/prefix or file:///directory; keys are AWS_ variables")
        return value


class BucketSettings(BaseSettings):
    """The variable AWS_ALLOW_HTTP, which allows sending credentials over unencrypted connections."""

    allow_http: bool = Field(default=False, validation_alias="AWS_ALLOW_HTTP")


class WorkerSettings(StorageSettings, BaseSettings):
    """Settings of a training worker. `serve` has them, too.

    `to_json` returns the document that a worker and its jobs' processes read. The document has no secrets: these
    processes read secrets from their environment.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    home: Path = Field(
        Path("data"),
        description="Everything stored: adapters, jobs, the converted base. One server uses it at a time, and "
        "only its owner can read it (mode 0700).",
    )
    model: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        max_length=4096,
        description=f"The base: {DEFAULT_MODEL}, a local directory, a GGUF file or a hub id.",
    )
    base_dir: Path | None = Field(None, description="Where a converted base is looked for first.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$",
        description="auto, cpu, cuda or cuda:N. auto is CUDA if there is a GPU, else the CPU.",
    )
    dtype: Dtype = Field(
        "auto",
        description="auto, fp32, bf16 or fp16. auto is bf16 if the GPU, the CPU or native code computes it, else "
        "fp32. fp16 is for serving; training then computes in fp32.",
    )
    native: bool = Field(
        True,
        description="Serve and train by native code if the processor has AVX2, AVX-512 or is a 64-bit Arm, and "
        "the wheel has native code or there is a C++ compiler, and serve by Triton kernels on a GPU if triton is "
        "installed; no: by torch.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Threads that serving and each training job compute with: one for each processor that the "
        "process may use, by affinity and CPU quota, or OMP_NUM_THREADS if that is less. Serving uses fewer "
        "while fewer are faster. Default: by the machine.",
    )
    log_format: LogFormat = Field(
        "text", description="Format of log lines, of workers and jobs, too: text or json."
    )
    database_url: SecretStr | None = Field(
        None,
        exclude=True,
        description="A PostgreSQL database (13 or newer) instead of the file in HOME, for several servers and "
        "workers: postgresql://user:password@host/database. Needs the extra cluster. Prefer the variable: other "
        "users may see a flag for a moment.",
    )
    train_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Share of the cores' time that training may take while requests run; 0: none, 1: no pauses.",
    )
    train_slice: float = Field(
        600,
        ge=0,
        le=86_400,
        description="Seconds that a training runs until it gives way, after its current step, to another "
        "project's waiting job if no worker is idle; 0: never.",
    )
    train_memory: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of a GPU's memory for training; the server has the rest. Default: 0.5 for all workers "
        "of a server together, or what is free for a worker elsewhere.",
    )

    @property
    def database(self) -> str | None:
        """Return the database's URL with its password, or None if it is the file in HOME."""
        return None if self.database_url is None else self.database_url.get_secret_value()

    def to_json(self) -> str:
        """Return a worker's settings as JSON, which `model_validate_json` reads."""
        return self.model_dump_json(include=set(WorkerSettings.model_fields))

    @field_validator("database_url", mode="after")
    @classmethod
    def _postgresql(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must be like postgresql://user:password@host/database")
        return value


class Settings(Limits, WorkerSettings):
    """Settings of `serve`: one field for each variable. Sizes are in bytes, or have a unit, as in "2GiB"."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        max_length=255,
        description="Where to listen; for a name with both kinds of address, its IPv4 address.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free port.")
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Sequences in one batch. Default: 32, or up to 256 on a GPU whose memory allows that many.",
    )
    max_queue: int = Field(
        256,
        ge=1,
        le=100_000,
        description="Sequences that may wait for a place in the batch. If the queue is full, a project with less "
        "than its share of it is still accepted, up to twice as many in all.",
    )
    prefill_share: float = Field(
        0.71,
        gt=0,
        lt=1,
        description="Share of a step's time that prompts may take while answers are generated (native code). "
        "Less gives shorter pauses between tokens and later first tokens.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        le=1 << 20,
        description="Tokens of a prompt and its answer. Default: the model's, at most 8192.",
    )
    kv_cache_bytes: ByteSize | None = Field(
        None, ge=1 << 20, description="Memory for keys and values, such as 2GiB. Default: by the machine."
    )
    adapter_cache_bytes: ByteSize | None = Field(
        None, ge=1 << 20, description="Memory for resident adapters. Default: by the machine."
    )
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        exclude=True,
        description="The operator's keys, comma-separated, each of 16 characters or more. @FILE is a file of "
        "mode 600 with a key on each line; it is read again when it changes. Prefer the file or the variable: "
        "other users may see a flag for a moment. Default: none.",
    )
    allow_anonymous: Anonymous = Field(
        "0",
        description="Clients without a key. 0: served on the loopback until the first key exists. until-keyed: "
        "off the loopback, too. 1: may generate and train in the project default, always.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated names that the server answers to, such as lora.example.org, *.example.org "
        "or *; others get 403, except for /health and /ready. Default: localhost, the host it listens on, and "
        "any IP address.",
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated sites whose pages may call the server from a browser, such as "
        "https://app.example.org or *; others get 403. Default: its own pages alone.",
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[\w.~-]+)*$",
        max_length=200,
        description="URL prefix under which a proxy mounts the server, such as /smolora; the proxy may strip it "
        "or not.",
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/?#]+(/[\w.~-]+)*$",
        max_length=300,
        description="URL by which clients reach the server, such as https://lora.example.org/lora, for its "
        "messages at start. Default: where it listens.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Comma-separated addresses or networks of proxies whose X-Forwarded-For and -Proto count. "
        "Default: none.",
    )
    stale_names: float = Field(
        300,
        ge=0,
        le=3600,
        description="Seconds for which a server may use a name of an adapter as it last read it, if PostgreSQL "
        "doesn't answer; 0: never.",
    )
    stale_keys: float | None = Field(
        None,
        ge=0,
        le=3600,
        description="The same for API keys, so that a revoked key may work for as long; 0: no request is served "
        "without PostgreSQL. Default: as STALE_NAMES.",
    )
    workers: int = Field(
        1, ge=0, le=64, description="Training workers that serve runs; 0: none, run smolora worker elsewhere."
    )
    retain_jobs: float = Field(
        0,
        ge=0,
        le=36_500,
        description="Days after which an ended job's model and log are removed; 0: never.",
    )
    retain_audit: float = Field(
        0, ge=0, le=36_500, description="Days after which entries of the audit list are removed; 0: never."
    )
    allow_hub_adapters: bool = Field(False, description="Let clients import adapters from the Hugging Face hub.")

    @property
    def training_memory(self) -> float:
        """Return the share of a GPU's memory that all workers together may use."""
        return (self.train_memory or _TRAIN_MEMORY) if self.workers else 0.0

    @property
    def allows_guests(self) -> bool:
        """Return whether a client without a key may generate and train, even if keys exist."""
        return self.allow_anonymous == "1"

    @property
    def of_a_worker(self) -> WorkerSettings:
        """Return the settings of one of the server's workers, with its share of the GPU memory for training."""
        share = self.training_memory / self.workers if self.workers else None
        return self.model_copy(update={"train_memory": share})

    @field_validator("allow_anonymous", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        """Convert words such as true and off, which boolean settings accept, to 1 or 0."""
        return _SWITCHES.get(str(value).lower(), value)

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        """Split keys at commas.

        Check the file of `@FILE`, but return `@FILE`: the server reads the file again later.
        """
        if not isinstance(value, str):
            return value
        if value.startswith("@"):
            operator_keys.read(Path(value[1:]))
            return (value,)
        if not (keys := operator_keys.split(value)) and value:
            raise ValueError("has no keys, only commas or blanks")
        return keys

    @field_validator("api_keys", mode="after")
    @classmethod
    def _check_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return value if value and value[0].startswith("@") else operator_keys.checked(value)

    @field_validator("allowed_hosts", "allowed_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return operator_keys.split(value) if isinstance(value, str) else value

    @field_validator("allowed_hosts", mode="after")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [name for name in value if not _HOST.fullmatch(name)]:
            raise ValueError(f"{bad[0]} is not a host name: leave out scheme and port, as in lora.example.org")
        return value

    @field_validator("allowed_origins", mode="after")
    @classmethod
    def _sites(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        sites = tuple(site.lower().rstrip("/") for site in value)
        if bad := [site for site in sites if not _ORIGIN.fullmatch(site)]:
            raise ValueError(
                f"{bad[0]} is not a site: give scheme, name and port, such as https://app.example.org"
            )
        return sites

    @field_validator("trusted_proxies", mode="after")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(f"{network} is not an address or network, such as 10.0.0.0/8") from None
        return value


SettingsT = TypeVar("SettingsT", bound=WorkerSettings)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load(kind: type[SettingsT], **flags: Flag) -> SettingsT:
    """Load the settings.

    Flags override variables unless they are None. Raise StartupError if a value is invalid.
    """
    try:
        return kind.model_validate({name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        messages = [_explain(fault["loc"], _in_words(fault)) for fault in error.errors()]
        raise StartupError("; ".join(messages)) from None


def described(kind: type[WorkerSettings], name: str) -> tuple[str, str]:
    """Return a setting's meaning and its default as texts. The second text is empty if there is no default."""
    field = kind.model_fields[name]
    meaning, _, default = (field.description or "").removesuffix(".").partition(". Default: ")
    value: object = field.default
    if isinstance(value, bool):
        default = "yes" if value else "no"
    elif isinstance(value, ByteSize):
        default = value.human_readable().replace(".0", "")
    elif value not in (None, (), ""):
        default = f"{value}"
    return f"{meaning}.", default


def to_flags(settings: Settings, names: Collection[str] = Settings.model_fields) -> list[str]:
    """Return the flags of the settings in `names` except secrets. `load` is the inverse.

    Values that equal the default are included, since the environment may set another value.
    """
    found = []
    for name, field in ((name, field) for name, field in Settings.model_fields.items() if name in names):
        value, flag = getattr(settings, name), name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{'' if value else 'no-'}{flag}")
        elif not (value is None or field.exclude):
            found.append(f"--{flag}={','.join(value) if isinstance(value, tuple) else value}")
    return found


def _explain(loc: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    if not loc:
        return message
    name = str(loc[0])
    return f"{PREFIX}{name.upper()} (--{name.replace('_', '-')}): {message}"


def _in_words(fault: ErrorDetails) -> str:
    """Return smolora's message for an error of pydantic if there is one, else pydantic's message."""
    if fault["type"] == "int_parsing" and str(fault["input"]).startswith("tcp://"):
        return "is a service's address, by Kubernetes: set enableServiceLinks: false for the pod, or the port here"
    if fault["type"] == "string_pattern_mismatch":
        return _PATTERN_MESSAGES.get(str(fault["loc"][0]), fault["msg"])
    return _MESSAGES.get(fault["type"], fault["msg"])
