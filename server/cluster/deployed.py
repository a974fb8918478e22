"""What was deployed last: a deployment of engine replicas changes only what its flags and variables say.

The database keeps the settings and the scale, so every machine of the cluster knows them, also after Ray was
started again.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa

from adapters.sql import reader_of, transact
from server.config import Settings, load
from server.errors import StartupError

OF_APIS = {
    *("host", "port", "root_path", "public_url", "trusted_proxies", "allowed_hosts", "allowed_origins"),
    *("max_connections", "header_timeout", "body_timeout", "stall_timeout", "min_free_bytes", "allow_anonymous"),
    *("api_keys", "database_url", "retain_jobs", "retain_audit"),
    *("allow_hub_adapters", "train_share", "train_slice", "stale_names", "stale_keys"),
}
"""Settings that replicas don't use."""
metadata = sa.MetaData()

deployments = sa.Table(
    "cluster_deployments",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),  # always 1
    sa.Column("settings", sa.JSON, nullable=False),  # by name, without defaults
    sa.Column("scale", sa.JSON, nullable=False),  # fields of `Scale`
)


@dataclass(frozen=True)
class Scale:
    """The number of replicas, and the resources of each.

    Autoscaling starts at most `most` replicas. If `most` is None, autoscaling is off.
    """

    replicas: int = 1
    most: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    upscale_seconds: float = 5.0
    downscale_seconds: float = 300.0
    is_ranged: bool = False
    """Whether Serve gets a range of replicas, even of a single number. It does once there was autoscaling, since
    replicas that started with autoscaling keep reporting for it."""
    spare: bool | None = None
    """Whether there is room for one more replica during an upgrade, so that a new replica starts before an old one
    stops. Otherwise the old one stops first. None: decide by Ray's free resources."""

    @property
    def is_autoscaled(self) -> bool:
        """Return whether the number of replicas follows the load."""
        return self.most is not None and self.most > self.replicas


@dataclass(frozen=True)
class Deployed:
    """The last deployment: the settings of replicas that aren't defaults, and the scale."""

    settings: Mapping[str, Any]
    scale: Scale


def recall(database: sa.Engine) -> Deployed | None:
    """Return the last deployment, or None if the database knows of none."""
    with reader_of(database).connect() as connection:
        row = connection.execute(sa.select(deployments)).one_or_none()
    return None if row is None else Deployed(row.settings, Scale(**row.scale))


def remember(database: sa.Engine, deployed: Deployed | None) -> None:
    """Store the last deployment, instead of the one before."""

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.delete(deployments))
        if deployed is not None:
            values = {"settings": dict(deployed.settings), "scale": asdict(replace(deployed.scale, spare=None))}
            connection.execute(sa.insert(deployments).values(id=1, **values))

    transact(database, work)


def merged_scale(before: Deployed | None, given: Mapping[str, Any]) -> Scale:
    """Return the scale of the last deployment with the changes `given`. Raise StartupError if they contradict."""
    kept = Scale() if before is None else before.scale
    scale = replace(kept, **given)
    if scale.most is not None and scale.most < scale.replicas:
        hint = "" if {"most", "replicas"} <= given.keys() else " (of the last deployment: give both)"
        raise StartupError(f"--max-replicas {scale.most} is less than --replicas {scale.replicas}{hint}")
    return replace(scale, is_ranged=kept.is_ranged or scale.is_autoscaled)


def merged_settings(before: Deployed | None, settings: Settings) -> Settings:
    """Return the settings with those of the last deployment, unless a flag or variable of this process sets them.

    Replicas keep their HOME, since `settings.home` is this machine's.
    """
    if before is None:
        return settings
    given = settings.model_fields_set - {"home"}
    known = Settings.model_fields.keys() - OF_APIS - given
    kept = load(Settings, **{name: value for name, value in before.settings.items() if name in known})
    return settings.model_copy(update={name: getattr(kept, name) for name in before.settings if name in known})
