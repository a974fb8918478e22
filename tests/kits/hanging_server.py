"""`python -m tests.kits.hanging_server`: a server whose engine's thread hangs or crawls on request.

Everything is real except for the runner, which looks at seeds. SLOW makes each step a tenth of a second longer.
LONG makes one step take nearly a second, and writes a file halfway. HANG makes the thread enter native code that
never returns, once the file HANG_NOW exists. A child process plays the training workers: it writes a file when it
gets SIGTERM.
"""

import argparse
import ctypes
import sys
from collections.abc import Sequence as Seq
from pathlib import Path

from server.api.app import create_app
from server.config import Settings
from server.engine.async_engine import AsyncEngine, Watchdog
from server.engine.runner import Drawn, Runner
from server.engine.sequence import Chunk
from server.jobs.supervisor import Supervisor
from server.jobs.yielding import BusyFlag
from server.serve.address import bind
from server.serve.process import run
from server.serve.startup import build

HANG, LONG, SLOW = 666, 667, 668
AFTER = 30
"""Tokens of a request before LONG or HANG takes effect."""
HANG_NOW, IN_THE_MIDDLE, LET_GO = "hang-now", "in-the-middle", "let-go"
_WORKER = """
import pathlib, signal, sys, threading
let_go = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: let_go.set())
let_go.wait()
pathlib.Path(sys.argv[1]).touch()
"""

libc = ctypes.CDLL(None)


class HangingRunner(Runner):
    """The engine's runner, with fits."""

    def __init__(self, runner: Runner, home: Path) -> None:
        super().__init__(runner.backend)
        self._home = home

    def run(self, chunks: Seq[Chunk]) -> list[Drawn]:
        places = {chunk.sequence.request.sampling.seed: chunk.sequence.num_output_tokens for chunk in chunks}
        if SLOW in places:
            libc.usleep(100_000)
        if places.get(LONG) == AFTER:
            for _ in range(40):
                libc.usleep(10_000)
            (self._home / IN_THE_MIDDLE).touch()
            for _ in range(40):
                libc.usleep(10_000)
        while places.get(HANG, 0) >= AFTER and (self._home / HANG_NOW).exists():
            libc.pause()
        return super().run(chunks)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kits.hanging_server", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--least-seconds", type=float, required=True, help="of a step before it counts as stalled")
    given = parser.parse_args()
    settings = Settings.model_validate(
        {"home": given.home, "model": str(given.model), "dtype": "fp32", "max_num_seqs": 6, "max_queue": 16}
    )
    services = build(settings, lambda line: None, Watchdog(given.least_seconds))
    assert isinstance(services.engine, AsyncEngine)
    engine = services.engine._engine
    engine.runner = HangingRunner(engine.runner, given.home)
    supervisor = Supervisor(1, [sys.executable, "-c", _WORKER, str(given.home / LET_GO)])
    bound = bind("127.0.0.1", given.port)
    flag = BusyFlag(given.home)
    reload = services.access.ring.reload
    sys.exit(
        run(create_app(services), services.engine, bound, lambda: None, supervisor, flag, (), settings, reload)
    )


if __name__ == "__main__":
    main()
