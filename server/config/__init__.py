"""Every setting of the server, from `SMOLORA_` environment variables and from `serve`'s flags.

The command line builds the settings once, with a flag for each field, and passes them in; nothing else reads the
environment. A flag wins over its variable, and an empty variable counts as unset. `server.model` and
`server.engine` know the hardware and decide what `auto` and None mean. `--help` and docs/settings.md show the
fields' descriptions.
"""

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from adapters.names import near
from server.config import operator_keys
from server.config.fields import Limits, SharedSettings, in_words
from server.errors import StartupError
from server.telemetry.logs import LogFormat

PREFIX = "SMOLORA_"
DEFAULT_MODEL = "smollm2-135m-instruct"

_TRAIN_MEMORY = 0.5  # the server has the rest
_OTHER_VARIABLES = ("URL", "API_KEY")  # read by commands that call a server

_SWITCHES = {"true": "1", "yes": "1", "on": "1", "false": "0", "no": "0", "off": "0"}

_HOST = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*|[0-9a-fA-F:.]+", re.ASCII)
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s?#]+", re.ASCII | re.IGNORECASE)

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Anonymous = Literal["0", "1", "until-keyed"]
Flag = str | int | float | bool | Path | None


class WorkerSettings(SharedSettings, BaseSettings):
    """Settings of a training worker, which `serve` has, too.

    `to_json` writes the document that a worker and its jobs' processes read. It has no secrets: these processes
    find them in their environment.
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
    base_dir: Path | None = Field(None, description="Where a converted base and native code are looked for first.")
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
        description="Serve and train by native code if the processor (AVX2, AVX-512, 64-bit Arm) and a C++ "
        "compiler allow it; no: by torch.",
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
    """Settings of `serve`: one field for each variable. Sizes in bytes also read "2GiB" and the like."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        max_length=255,
        description="Where to listen; for a name with both kinds of address, its IPv4 address.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free port.")
    max_num_seqs: int = Field(32, ge=1, le=1024, description="Sequences in one batch.")
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
    workers: int = Field(
        1, ge=0, le=64, description="Training workers that serve runs; 0: none, run smolora worker elsewhere."
    )
    retain_jobs: float = Field(
        0,
        ge=0,
        le=36_500,
        description="Days after which an ended job's model and log are removed; 0: never.",
    )
    allow_hub_adapters: bool = Field(False, description="Let clients import adapters from the Hugging Face hub.")

    @property
    def training_memory(self) -> float:
        """Return the share of a GPU's memory that all workers have together."""
        return (self.train_memory or _TRAIN_MEMORY) if self.workers else 0.0

    @property
    def allows_guests(self) -> bool:
        """Return whether a client without a key may generate and train, even if keys exist."""
        return self.allow_anonymous == "1"

    @property
    def of_a_worker(self) -> WorkerSettings:
        """Return the settings of each worker."""
        share = self.training_memory / self.workers if self.workers else None
        return self.model_copy(update={"train_memory": share})

    @field_validator("allow_anonymous", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        """Accept the words of other switches, such as true, for 1 and 0."""
        return _SWITCHES.get(str(value).lower(), value)

    @field_validator("api_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        """Split keys at commas; keep the name of `@FILE`, since the server reads it again when it changes."""
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
            raise ValueError(f"{bad[0]} is no name: give it without scheme and port, such as lora.example.org")
        return value

    @field_validator("allowed_origins", mode="after")
    @classmethod
    def _sites(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        sites = tuple(site.lower().rstrip("/") for site in value)
        if bad := [site for site in sites if not _ORIGIN.fullmatch(site)]:
            raise ValueError(f"{bad[0]} is no site: give scheme, name and port, such as https://app.example.org")
        return sites

    @field_validator("trusted_proxies", mode="after")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(f"{network} is no address or network, such as 10.0.0.0/8") from None
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
    """Load the settings; flags that aren't None win. Raise StartupError with a message of one line."""
    try:
        return kind.model_validate({name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        messages = [_explain(fault["loc"], in_words(fault)) for fault in error.errors()]
        raise StartupError("; ".join(messages)) from None


def described(kind: type[WorkerSettings], name: str) -> tuple[str, str]:
    """Return what a setting means and its default in words, which is empty if there is none."""
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


def server_url() -> str:
    """Return the server's default URL for commands: SMOLORA_URL, else this machine's."""
    return os.environ.get(f"{PREFIX}URL") or local_url()


def local_url() -> str:
    """Return the URL of a server on this machine that has these variables."""
    try:
        port = int(os.environ.get(f"{PREFIX}PORT") or Settings.model_fields["port"].default)
    except ValueError:
        raise StartupError(f"{PREFIX}PORT: must be a number") from None
    return f"http://127.0.0.1:{port}"


def unknown_variables() -> list[str]:
    """Return a warning for each variable that looks like a setting and is none."""
    known = {*map(str.upper, Settings.model_fields), *_OTHER_VARIABLES}
    found = []
    for name in sorted(variable[len(PREFIX) :] for variable in os.environ if variable.startswith(PREFIX)):
        if name not in known:
            meant = near(name, known)
            found.append(
                f"{PREFIX}{name} is not a setting" + (f": did you mean {PREFIX}{meant}?" if meant else "")
            )
    return found


def trace_exporters() -> tuple[str, ...]:
    """Return the exporters that OpenTelemetry's own variables ask for, by their entry points' names."""
    named = os.environ.get("OTEL_TRACES_EXPORTER", "")
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or named == "none":
        return ()
    signal, general = "OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_"
    if not named and not (os.environ.get(f"{signal}ENDPOINT") or os.environ.get(f"{general}ENDPOINT")):
        return ()
    protocol = os.environ.get(f"{signal}PROTOCOL") or os.environ.get(f"{general}PROTOCOL") or "http/protobuf"
    otlp = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}.get(protocol, protocol)
    return tuple(otlp if name == "otlp" else name for name in map(str.strip, (named or "otlp").split(",")) if name)


def _explain(loc: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    if not loc:
        return message
    name = str(loc[0])
    return f"{PREFIX}{name.upper()} (--{name.replace('_', '-')}): {message}"
