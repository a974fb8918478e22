"""Strikes on a whole cluster, for `tests.stress.cluster_rounds`."""

import math
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from server.database import connect
from server.jobs.leases import LEASE_SECONDS
from tests.cluster.whole import Part, Whole
from tests.end_to_end.training_client import wait_until
from tests.kits.buckets import Failure
from tests.kits.migrations import upgrade_smolora
from tests.stress.fault_load import COUNTED_AFTER, Load

PAST_THE_LEASE = LEASE_SECONDS + 2
MINUTE = 60.0


@dataclass
class Outage:
    """Downtime of an API process from kill to readiness, in seconds of the monotonic clock."""

    url: str
    begin: float
    end: float = math.inf


@dataclass
class Rounds:
    """A cluster under strikes."""

    whole: Whole
    load: Load
    down: list[Outage] = field(default_factory=list)
    reading: dict[int, bool] = field(default_factory=dict)  # by thread: whether a token has arrived


def strike(rounds: Rounds, only: str | None = None, is_long: bool = False) -> str:
    """Strike at random or `only` so, and return the strike's name. Everything is running again some time later.

    Strikes that take long are among the random ones if `is_long` is true.
    """
    strikes = {**STRIKES, **(LONG if is_long or only in LONG else {})}
    name = only or rounds.load.rng.choices(list(strikes), [weight for weight, _ in strikes.values()])[0]
    strikes[name][1](rounds)
    return name


def kill(part: Part) -> Callable[[Rounds], None]:
    def strike(rounds: Rounds) -> None:
        found = rounds.whole.parts(part)
        if not found:
            return
        with suppress(psutil.NoSuchProcess):
            victim = rounds.load.rng.choice(found)
            if part == "replica":
                for has_begun in list(rounds.reading.values()):
                    when = "after" if has_begun else "before"
                    rounds.load.done[f"streams at a replica's end, {when} the first token"] += 1
            if part == "worker" and victim.pid == rounds.whole.second_worker.pid:
                victim.kill()
                rounds.whole.second_worker.wait()
                rounds.whole.second_worker = rounds.whole.start_worker()
                return
            victim.kill()

    return strike


def kill_api(rounds: Rounds) -> None:
    number = rounds.load.rng.randrange(2)
    url = rounds.whole.urls[number]
    port = f"--port={url.rpartition(':')[2]}"
    for process in rounds.whole.parts("api"):
        if port in process.cmdline():
            begin_outages(rounds, [url])
            process.kill()
            process.wait(30)
    wait_until(lambda: rounds.whole.is_api_ready(number), 300, url)
    end_outages(rounds)


def begin_outages(rounds: Rounds, urls: Sequence[str]) -> None:
    """Note that the API processes at these URLs are about to be killed."""
    now = time.monotonic()
    rounds.load.strikes.append(now)
    rounds.down += [Outage(url, now) for url in urls]


def end_outages(rounds: Rounds) -> None:
    """Note that all API processes are ready again."""
    for outage in rounds.down:
        outage.end = min(outage.end, time.monotonic())


def kill_ray(part: Part) -> Callable[[Rounds], None]:
    """Kill Ray's head or its raylet; Ray ends then, and `up` starts it again with the replicas."""

    def strike(rounds: Rounds) -> None:
        before = {process.pid for process in rounds.whole.parts(part)}
        kill(part)(rounds)

        def is_back() -> bool:
            found = {process.pid for process in rounds.whole.parts(part)}
            return bool(found) and not found & before and len(rounds.whole.parts("replica")) == 2

        wait_until(lambda: is_back() and rounds.whole.is_ready(), 300, f"{part} isn't back")

    return strike


def kill_up(rounds: Rounds) -> None:
    """Kill `up`, with which its API processes and workers end, and start it again."""
    begin_outages(rounds, rounds.whole.urls)
    apis = rounds.whole.parts("api")  # they are no longer its children then
    rounds.whole.up.kill()
    rounds.whole.up.wait()
    _, alive = psutil.wait_procs(apis, 60)
    assert not alive, "API processes go on without up"
    rounds.whole.start_up()
    wait_until(rounds.whole.is_ready, 300, "up isn't back")
    end_outages(rounds)


def deploy_bare(rounds: Rounds) -> None:
    """Deploy without flags, which changes nothing."""
    before = {process.pid for process in rounds.whole.parts("replica")}
    rounds.whole.deploy()
    after = {process.pid for process in rounds.whole.parts("replica")}
    if len(before) == 2 and before != after:
        rounds.load.wrong.append(f"a deploy without flags replaced {before} by {after}")


def migrate_to_a_later_schema(rounds: Rounds) -> None:
    """Migrate the database as the next version would, then have an API process and a job's process start again."""
    with pytest.MonkeyPatch.context() as later, tempfile.TemporaryDirectory() as scratch:
        upgrade_smolora(later, Path(scratch))
        connect(rounds.whole.home, url=rounds.whole.database_url).dispose()
    kill("job")(rounds)
    kill_api(rounds)


def kill_stopped_replica(rounds: Rounds) -> None:
    """Stop a replica, so that its requests get no tokens, then kill it."""
    if len(rounds.whole.parts("replica")) == 2:
        for process in rounds.whole.parts("replica")[: rounds.load.rng.randint(1, 2)][-1:]:
            process.send_signal(signal.SIGSTOP)
            time.sleep(rounds.load.rng.uniform(0.2, 2))
        kill("replica")(rounds)
        for process in rounds.whole.parts("replica"):
            process.send_signal(signal.SIGCONT)


def stop(part: Part, least: float, most: float) -> Callable[[Rounds], None]:
    def strike(rounds: Rounds) -> None:
        rng = rounds.load.rng
        for process in rng.sample(found := rounds.whole.parts(part), min(1, len(found))):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
                time.sleep(rng.uniform(least, most))
                process.send_signal(signal.SIGCONT)

    return strike


def restart_postgres(rounds: Rounds) -> None:
    rounds.whole.postgres.kill()
    time.sleep(rounds.load.rng.uniform(0, 1))
    rounds.whole.postgres.start()
    time.sleep(3 * COUNTED_AFTER)  # usage counted until now is stored


def hang_postgres(rounds: Rounds) -> None:
    """Stop PostgreSQL, which then accepts connections and doesn't answer."""
    rounds.whole.postgres.pause()
    time.sleep(MINUTE)
    rounds.whole.postgres.resume()
    rounds.load.strikes.append(time.monotonic())


def lose_postgres(rounds: Rounds) -> None:
    """Kill PostgreSQL for longer than a lease."""
    rounds.load.strikes.append(time.monotonic())
    rounds.whole.postgres.kill()
    time.sleep(3 * LEASE_SECONDS)
    rounds.whole.postgres.start()
    rounds.load.strikes.append(time.monotonic())


def fail_store(failure: Failure, least: float = 0.5, most: float = 4.0) -> Callable[[Rounds], None]:
    def strike(rounds: Rounds) -> None:
        rounds.whole.proxy.fail(failure)
        time.sleep(rounds.load.rng.uniform(least, most))
        rounds.whole.proxy.fail("")

    return strike


STRIKES: dict[str, tuple[int, Callable[[Rounds], None]]] = {
    "kill a replica": (4, kill("replica")),
    "kill a replica, and one is stopped": (2, kill_stopped_replica),
    "kill an API process": (3, kill_api),
    "kill a worker": (2, kill("worker")),
    "kill a job's process": (3, kill("job")),
    "kill Serve's controller": (1, kill("controller")),
    "restart PostgreSQL": (2, restart_postgres),
    "the store answers 500": (1, fail_store("500")),
    "the store stalls": (1, fail_store("stall")),
    "the store cuts connections": (1, fail_store("cut")),
    "the store's answers end halfway": (1, fail_store("half")),
    "stop a worker past its lease": (1, stop("worker", PAST_THE_LEASE, PAST_THE_LEASE + 2)),
    "stop a replica": (2, stop("replica", 0.2, 5)),
    "a bare deploy": (1, deploy_bare),
    "a later schema": (1, migrate_to_a_later_schema),
}
LONG: dict[str, tuple[int, Callable[[Rounds], None]]] = {
    "PostgreSQL hangs": (1, hang_postgres),
    "PostgreSQL is away past the lease": (1, lose_postgres),
    "the store hangs": (1, fail_store("stall", MINUTE, MINUTE)),
    "kill gcs_server": (1, kill_ray("gcs_server")),
    "kill a raylet": (1, kill_ray("raylet")),
    "kill up": (1, kill_up),
}
"""Strikes that take about a minute each."""
