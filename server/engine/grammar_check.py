"""Vet untrusted grammars in another process, with limits on time and memory.

`python -m server.engine.grammar_check` reads a tokenizer and then grammars, as lines of JSON. For each grammar it
forks a child, which compiles the grammar and tries it out. A limit on time or memory, or a stack overflow, only
kills the child. The wall-clock limit is longer for a child that hardly got to run on a busy machine. A child that
takes longer than usual grammars need is given a lower priority than the server. The process doesn't wait for a
child to die, since that takes long at a low priority. The process ends when its standard input ends.
`GrammarChecker` is the client of the process.
"""

import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO, NoReturn

from llguidance import LLTokenizer

from server.engine.grammar import GrammarRefused, compiled, try_out
from server.engine.request import Grammar
from server.errors import NotReady

CPU_SECONDS = 0.4
"""Limit on the processor time of one grammar. Real grammars take 10 to 30 ms."""
WALL_SECONDS = 0.9
"""Limit on the wall-clock time of a grammar that has had `_NORMAL_PRIORITY_SECONDS` of processor time."""

_NORMAL_PRIORITY_SECONDS = 0.06  # processor time, more than real grammars take; then the priority is lowered
_STARVED_SECONDS = 5.0  # limit on the wall-clock time of a grammar that has had less
_LOOK_SECONDS = 0.05  # between two looks at a child's processor time
_MEMORY = 1 << 30  # bytes of address space
_NICE = 15
_NEWS_SECONDS = 0.7  # allowance for passing on the answer on a busy machine
_START_SECONDS = 20.0
_TOO_HARD = "takes too long to compile: make it simpler"
_TOO_BUSY = "the machine is too busy to compile grammars now"


class GrammarChecker:
    """The client of the process that vets grammars.

    It starts the process when it is first needed, and restarts a process that has died. Any thread may call the
    methods.
    """

    def __init__(
        self, tokenizer: str, vocab_size: int, eos_token_ids: tuple[int, ...], environment: Mapping[str, str]
    ) -> None:
        """`tokenizer` is the text of a Hugging Face tokenizer.json. The process gets this `environment`."""
        self._environment = environment
        self._setup = _line([tokenizer, vocab_size, list(eos_token_ids)])
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = bytearray()
        self._closed = False

    def start(self) -> None:
        """Start the process, and wait until it is ready."""
        with self._lock, suppress(NotReady):
            self._running()

    def close(self) -> None:
        """End the process for good."""
        with self._lock:
            self._closed = True
            self._kill()

    def check(self, grammar: Grammar) -> None:
        """Vet a grammar. Raise GrammarRefused if the grammar is refused, or NotReady if it can't be vetted now.

        This blocks while earlier grammars are vetted, and then for up to WALL_SECONDS (`_STARVED_SECONDS` on a
        busy machine).
        """
        with self._lock:
            for _ in range(2):  # the process may have died since the last grammar
                process = self._running()
                assert process.stdin is not None
                with suppress(OSError):
                    process.stdin.write(_line([grammar.kind, grammar.source]))
                    process.stdin.flush()
                    answer = self._read(process, _STARVED_SECONDS + _NEWS_SECONDS)
                    if answer is None and not _has_died(process):
                        self._kill()
                        threading.Thread(target=self.start, name="grammar-check", daemon=True).start()
                        raise NotReady(_TOO_BUSY)
                    if answer == _TOO_BUSY:
                        raise NotReady(_TOO_BUSY)
                    if answer:
                        raise GrammarRefused(answer)
                    if answer is not None:
                        return
                self._kill()
            raise NotReady("grammars can't be compiled now")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise NotReady("grammars can't be compiled now")
        if self._process is not None:
            return self._process
        self._answers.clear()
        command = [sys.executable, "-P", "-m", "server.engine.grammar_check"]
        try:
            process = subprocess.Popen(  # noqa: S603  # no argument comes from outside
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=dict(self._environment),
            )
            self._process = process
            assert process.stdin is not None
            process.stdin.write(self._setup)
            process.stdin.flush()
            is_ready = self._read(process, _START_SECONDS) == ""
        except OSError:
            is_ready = False
        if not is_ready:
            self._kill()
            raise NotReady("grammars can't be compiled now")
        return process

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> str | None:
        """Return the next answer, or None if the process has died or takes too long."""
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        poll = select.poll()  # select.select doesn't support descriptors from 1024 on
        poll.register(process.stdout, select.POLLIN)
        while b"\n" not in self._answers:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1e3):
                return None
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                return None
            self._answers += read
        line, _, rest = self._answers.partition(b"\n")
        self._answers = rest
        return str(json.loads(line))

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


def _has_died(process: subprocess.Popen[bytes]) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.1)
        return True
    return False


def serve() -> None:
    """Run the process: read the tokenizer, then vet grammars until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = sys.stdin.buffer
    setup = lines.readline()
    if not setup:
        return
    source, vocab_size, eos_token_ids = json.loads(setup)
    tokenizer = LLTokenizer(source, n_vocab=vocab_size, eos_token=eos_token_ids)
    os.write(1, _line(""))
    for line in iter(lines.readline, b""):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            _compile(tokenizer, Grammar(*json.loads(line)), frozenset(eos_token_ids), writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as answer:
            os.write(1, _answer_of(child, answer))
        os.kill(child, signal.SIGKILL)
        _reap()


def _answer_of(child: int, answer: BinaryIO) -> bytes:
    """Return the child's answer, or a refusal instead if the child dies or takes too long."""
    poll = select.poll()
    poll.register(answer, select.POLLIN)
    begun = time.monotonic()
    is_nice = False
    while not poll.poll(_LOOK_SECONDS * 1e3):
        seconds = time.monotonic() - begun
        if _processor_seconds(child) < _NORMAL_PRIORITY_SECONDS:
            if seconds > _STARVED_SECONDS:
                return _line(_TOO_BUSY)
        elif seconds > WALL_SECONDS:
            return _line(_TOO_HARD)
        elif not is_nice:
            is_nice = True
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, child, _NICE)
    line = answer.readline()
    return line if line.endswith(b"\n") else _line(_TOO_HARD)


def _processor_seconds(child: int) -> float:
    """Return the child's processor time so far, or infinity if it is unknown.

    The id of the child's clock is computed in the same way as in Linux's clock_getcpuclockid(3).
    """
    with suppress(OSError):
        return time.clock_gettime(~child << 3 | 2)
    return math.inf


def _reap() -> None:
    """Reap the children that have died so far."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _compile(tokenizer: LLTokenizer, grammar: Grammar, eos_token_ids: frozenset[int], writer: int) -> NoReturn:
    """Run the child: vet the grammar, write the answer and exit. A limit may kill the child earlier."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, _STARVED_SECONDS + _NEWS_SECONDS)  # in case the parent has died
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    try:
        try_out(compiled(tokenizer, grammar), eos_token_ids)
    except GrammarRefused as refusal:
        answer = str(refusal)
    except BaseException:  # a panic of llguidance isn't an Exception
        answer = "can't be compiled"
    else:
        answer = ""
    os.write(writer, _line(answer))
    os._exit(0)


def _line(document: object) -> bytes:
    return json.dumps(document).encode() + b"\n"


if __name__ == "__main__":
    serve()
