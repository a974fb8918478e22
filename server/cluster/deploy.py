"""The deployment of engine replicas on Ray Serve. Serve's own config files can use `build_app`."""

import asyncio
import logging
import math
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

import adapters
import server
from adapters.errors import SmoloraError
from server.cluster.deployed import OF_APIS, Deployed, Scale, merged_scale, merged_settings, recall, remember
from server.cluster.finder import (
    Addresses,
    has_room,
    is_too_small,
    join,
    replica_counts,
    running_replicas,
    start_fault,
)
from server.cluster.messages import APP, DEPLOYMENT, Batch, Welcome
from server.cluster.replica import EngineReplica
from server.config import DEFAULT_MODEL, Flag, Settings, load
from server.database import connect
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.errors import StartupError
from server.jobs.yielding import NUM_PLACES, BusyFlag
from server.model.load import load_on_device
from server.serve.engine import base_directory, gpu_share, guidance_of, make_engine
from server.storage.home import make
from server.storage.places import Storage
from server.system.memory import keep_freed_memory
from server.system.messages import plural
from server.system.threads import switch_quickly
from server.telemetry import logs

_DRAIN_SECONDS = 20.0
"""Seconds that a replica gets for stopping, in addition to the longest duration of a request."""
HEALTH_SECONDS = 2.0
_HEALTH_TIMEOUT_SECONDS = 10.0  # after three timeouts in a row a replica is replaced
_MAX_CALLS = 100_000  # concurrent calls of a replica: the engine's own queue refuses requests, not Serve
_BUSY_BLOCKS = 0.9  # used share of a replica's blocks above which one more replica is wanted

_ANSWER_SECONDS = 20.0  # for a replica to report its base and its API processes
_CODE = ("*.py", "*.cpp", "*.h")  # files of the code that replicas run

log = logging.getLogger(__name__)


class Engine:
    """The actor that Serve runs. It passes calls to an `EngineReplica`."""

    def __init__(self, settings: Settings) -> None:
        switch_quickly()
        keep_freed_memory()
        logs.set_up(settings.log_format)
        make(settings.home)
        directory = base_directory(settings, log.info)
        base = load_on_device(settings, directory, log.info, partial(gpu_share, settings))
        guidance = guidance_of(base)
        # Without the check, which writes: replicas only read, and may have a key that allows no more.
        storage = Storage.open(settings.home, settings, check=False)
        store = storage.adapters(grace=2 * settings.request_timeout)
        engine = make_engine(settings, base, store, guidance, log.info)
        flag = BusyFlag(settings.home, place=1 + os.getpid() % (NUM_PLACES - 1))  # place 0 is an API process's
        self._replica = EngineReplica(engine, guidance, base.digest, base.config.vocab_size, flag.set)

    async def follow(self, client: str) -> AsyncGenerator[Welcome | Batch, None]:
        async for message in self._replica.follow(client):
            yield message

    async def submit(self, client: str, request: GenerationRequest) -> SmoloraError | None:
        return await self._replica.submit(client, request)

    async def abort(self, client: str, request_id: str) -> None:
        await self._replica.abort(client, request_id)

    async def check_health(self) -> None:
        await self._replica.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return self._replica.record_autoscaling_stats()


def desired_replicas(context: AutoscalingContext) -> tuple[int, dict[str, object]]:
    """Return the wanted number of replicas: enough for the sequences in flight.

    If a replica's KV cache is nearly full, the wanted number is at least one more than the present number. Serve's
    own count of calls can't be used: each API process always has one call to each replica.
    """
    found = context.aggregated_metrics or {}
    in_flight = sum(found.get("in_flight", {}).values())
    fullest = max(found.get("kv_used", {}).values(), default=0.0)
    wanted = math.ceil(in_flight / context.config.target_ongoing_requests)
    if fullest > _BUSY_BLOCKS:
        wanted = max(wanted, context.current_num_replicas + 1)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return min(max(wanted, least), most), {}


def engine_app(settings: Settings, scale: Scale) -> serve.Application:
    """Return the application for `serve.run`. Its settings have no secrets, since replicas need none."""
    options: dict[str, object] = {"num_replicas": scale.replicas}
    if scale.is_autoscaled or scale.is_ranged:
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.replicas,
                initial_replicas=scale.replicas,
                max_replicas=max(scale.most or 0, scale.replicas),
                target_ongoing_requests=settings.max_num_seqs or SchedulerLimits.max_num_seqs,
                metrics_interval_s=1,
                look_back_period_s=2,
                upscale_delay_s=scale.upscale_seconds,
                downscale_delay_s=scale.downscale_seconds,
                policy=AutoscalingPolicy(policy_function=desired_replicas),
            )
        }
    deployment = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=_MAX_CALLS,
        max_surge_percent=0 if scale.spare is False else 1,  # rounded up to one replica, if there are at most 100
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=_HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=settings.request_timeout + _DRAIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        **options,
    )(Engine)
    public = settings.model_copy(update={"api_keys": (), "database_url": None})
    return deployment.options(version=version_of(public), _internal=True).bind(public)


def version_of(settings: Settings) -> str:
    """Return a hash of the settings and code of a replica. If the hash changes, Serve replaces all replicas.

    Without a version, Serve would choose a random one at each deployment.
    """
    found = blake2b(repr(settings.model_dump(mode="json", exclude=OF_APIS)).encode(), digest_size=16)
    for package in (adapters, server):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for path in sorted(file for kind in _CODE for file in root.rglob(kind)):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def build_app(flags: Mapping[str, Flag]) -> serve.Application:
    """Build the application for a Serve config file whose `import_path` is server.cluster.deploy:build_app.

    `flags` are the file's `args`, which map the names of settings to values.
    """
    return engine_app(load(Settings, **flags), Scale())


def deploy(settings: Settings, scale: Scale, say: Callable[[str], None]) -> DeploymentHandle:
    """Deploy replicas, or upgrade running ones one at a time, and wait until all are healthy.

    `say` is called with a message if Ray has too few resources. Raise StartupError if new replicas don't start.
    """
    if is_too_small(scale.replicas * scale.num_cpus, scale.replicas * scale.num_gpus):
        say(
            f"waiting for machines to join: {plural(scale.replicas, 'replica')} with {scale.num_cpus:g} cores "
            f"and {scale.num_gpus:g} GPUs each are more than Ray has (--replica-cpus, --replica-gpus, --replicas)"
        )
    serve.start(proxy_location="Disabled")
    if scale.spare is None:
        num_coming = max(0, scale.replicas - sum(replica_counts().values()))
        num_more = num_coming + 1
        scale = replace(scale, spare=has_room(num_more * scale.num_cpus, num_more * scale.num_gpus))
    try:
        return serve.run(engine_app(settings, scale), name=APP, route_prefix=None)
    except RuntimeError as error:
        raise StartupError(f"the engine replicas don't start: {start_fault() or error}") from None


def redeploy(
    settings: Settings, address: str, given: Mapping[str, Any], *, forget: bool, say: Callable[[str], None]
) -> None:
    """Deploy what was deployed before, with the changes of these settings and of `given`, fields of `Scale`.

    If `forget` is true, the last deployment doesn't count. Raise StartupError if replicas don't start, if API
    processes serve another base, or if replicas run and the database doesn't know how they were deployed.
    """
    database = connect(settings.home, url=settings.database)
    try:
        before = recall(database)
        usual = None if forget else before
        scale, wanted = merged_scale(usual, given), merged_settings(usual, settings)
        join(address)
        if running := replica_counts().get("running", 0):
            if before is None and "replicas" not in given:
                raise StartupError(
                    f"{plural(running, 'replica')} run, and this database doesn't know with which flags they were "
                    "deployed: give SMOLORA_HOME and SMOLORA_DATABASE_URL of smolora cluster up, or all its flags"
                )
            _refuse_another_base(wanted, before, say)
        settings_of_replicas = wanted.model_dump(mode="json", include=wanted.model_fields_set - OF_APIS)
        remember(database, Deployed(settings_of_replicas, scale))
        try:
            deploy(wanted, scale, say)
        except StartupError:
            remember(database, before)
            raise
    finally:
        database.dispose()


def _refuse_another_base(wanted: Settings, before: Deployed | None, say: Callable[[str], None]) -> None:
    """Raise StartupError if API processes serve a base other than the wanted one: they would find no replica."""
    if before is not None and before.settings.get("model", DEFAULT_MODEL) == wanted.model:
        return
    digest, num_apis = asyncio.run(_served(next(running_replicas())))
    if not num_apis:
        return
    from server.model.base.weights import load_base

    if load_base(base_directory(wanted, say)).digest != digest:
        raise StartupError(
            f"API processes ({num_apis}) serve another base than SMOLORA_MODEL={wanted.model} (--model): "
            "start another cluster for it, or end this one's API processes first (smolora cluster down)"
        )


async def _served(running: Addresses) -> tuple[str, int]:
    """Return the digest of the replicas' base, and the number of API processes that use them.

    The number is 0 if no replica answers.
    """
    from server.cluster.transport import ReplicaTransport

    transport = ReplicaTransport("", running)
    for name in running:
        digest = ""
        with suppress(Exception):  # a replica that fails or is ending: ask another one
            async with asyncio.timeout(_ANSWER_SECONDS), aclosing(transport.follow(name, "deploy")) as messages:
                async for message in messages:
                    if isinstance(message, Welcome):
                        digest = message.base_digest
                    elif isinstance(message, Batch) and message.state is not None:
                        return digest, message.state.num_followers - 1
    return "", 0
