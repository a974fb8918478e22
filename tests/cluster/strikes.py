"""Strikes on a whole cluster, for `tests.stress.cluster_rounds`."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from tests.cluster.whole import Part, Whole
from tests.end_to_end.training_client import wait_until
from tests.kits.buckets import Failure
from tests.stress.fault_load import COUNTED_AFTER, Load

PAST_THE_LEASE = 12.0


@dataclass
class Outage:
    """Downtime of an API process from kill to readiness, in seconds of the monotonic clock."""

    url: str
    begin: float
    end: float = math.inf


@dataclass
class Rounds:
    """A cluster under strikes. `expected` is the single process's answer to each body, by the body's JSON."""

    whole: Whole
    load: Load
    expected: dict[str, str]
    down: list[Outage] = field(default_factory=list)
    reading: dict[int, bool] = field(default_factory=dict)  # by thread: whether a token has arrived


def strike(rounds: Rounds) -> str:
    """Strike at random; everything is running again some time later."""
    rng = rounds.load.rng
    names = list(STRIKES)
    name = rng.choices(names, [STRIKES[name][0] for name in names])[0]
    STRIKES[name][1](rounds)
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
            now = time.monotonic()
            rounds.load.strikes.append(now)
            rounds.down.append(Outage(url, now))
            process.kill()
            process.wait(30)
    wait_until(lambda: rounds.whole.is_api_ready(number), 300, url)
    for outage in rounds.down:
        outage.end = min(outage.end, time.monotonic())


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


def fail_store(failure: Failure) -> Callable[[Rounds], None]:
    def strike(rounds: Rounds) -> None:
        rounds.whole.proxy.fail(failure)
        time.sleep(rounds.load.rng.uniform(0.5, 4))
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
}
