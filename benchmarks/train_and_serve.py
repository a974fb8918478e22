"""Measure training while serving: `python -m benchmarks.train_and_serve`.

The real server answers streams over HTTP, first while its worker is idle and then while the worker trains a job.
The job is also timed without any requests. Writes train_and_serve.json.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

if not __package__:  # run by its path: Python put this folder first, not the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx

from benchmarks import command
from benchmarks.command import Made, positive
from benchmarks.machine import Machine
from benchmarks.measure import Figures
from benchmarks.prompts import PromptSource
from benchmarks.serving.load import drive, summarize
from benchmarks.serving.systems.server_process import Server, ServerConfig
from benchmarks.serving.systems.wires import Request, Smolora
from benchmarks.training.train_and_serve_report import Results, Round, markdown
from server.client.client import Client
from server.model.base.source import resolve_base
from server.model.base.weights import load_base

PROMPT_TOKENS = 32
ROW_TOKENS, BATCH_SIZE, NUM_ROWS = 128, 4, 64
WITHIN = 120.0  # seconds for a job to reach its first steps
POLL = 0.1


def main(arguments: list[str] | None = None) -> Results:
    """Run the benchmark; return, print and write the results."""
    parser = command.parser("benchmarks.train_and_serve", "Measure serving while a job trains, and the job.")
    parser.add_argument(
        "--rounds", type=positive, default=3, help="number of rounds; each measures everything once"
    )
    parser.add_argument("--streams", type=positive, default=4)
    parser.add_argument("--tokens", type=positive, default=2048, help="new tokens per stream and round")
    parser.add_argument(
        "--job-steps", type=positive, default=8, help="steps for which the job is timed without streams"
    )
    parser.add_argument("--train-share", type=float, default=0.25, help="as SMOLORA_TRAIN_SHARE")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.tokens, options.job_steps = 1, 64, 2
    say = command.speaker()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that children are stopped
    options.out.mkdir(parents=True, exist_ok=True)
    converted = resolve_base(options.model, options.home, progress=say)
    base = load_base(converted)
    dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(base.dtype).removeprefix("torch.")]
    prompts = PromptSource(base.tokenizer)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=options.out) as scratch:
        home, log = Path(scratch) / "home", options.out / "train_and_serve.log"
        config = ServerConfig(
            home,
            converted.parent,
            options.model,
            dtype,
            "cpu",
            options.threads,
            log,
            workers=1,  # the server's own worker, as by default: niceness only ranks processes of one session
            train_share=options.train_share,
        )
        with Server(config) as server:
            for number in range(options.rounds):
                rounds.append(_round(server.url, prompts, options))
                found = rounds[-1]
                itl = f"{found.alone.itl_p50 * 1e3:.1f} → {found.with_job.itl_p50 * 1e3:.1f} ms"
                job = f"{found.job_alone:.0f} → {found.job_with_streams:.0f} tokens/s"
                say(f"round {number + 1}: ITL p50 {itl}, job {job}")
            server.stop()
    work = (
        f"{Path(options.model).name} in {dtype}; {options.streams} streams, {options.tokens} new tokens each; "
        f"a LoRA r=16 job on rows of {ROW_TOKENS} tokens; train share {options.train_share:g}"
    )
    made = Made.by("benchmarks.train_and_serve", arguments, quick=options.quick)
    results = Results(made, Machine.this(options.threads), work, tuple(rounds))
    command.write(options.out, "train_and_serve", results)
    print(markdown(results))
    return results


def _round(url: str, prompts: PromptSource, options: argparse.Namespace) -> Round:
    def serve() -> Figures:
        requests = [[Request(text, (), options.tokens)] for text in prompts.take(options.streams, PROMPT_TOKENS)]
        return Figures.of(summarize(drive(url, Smolora(), requests)))

    with Client(url) as client:
        alone = serve()
        job = _submit(client, prompts)
        try:
            _wait_for_steps(client, job, 2)
            started = datetime.now(UTC)
            _wait_for_steps(client, job, 2 + options.job_steps)
            job_alone = _speed(client, job, started, datetime.now(UTC))
            started = datetime.now(UTC)
            with_job = serve()
            job_with_streams = _speed(client, job, started, datetime.now(UTC))
        finally:
            client.steer(job, "cancel")
        while client.job(job)["status"] == "running":  # until the job has freed the cores
            time.sleep(POLL)
    return Round(alone, with_job, job_alone, job_with_streams)


def _submit(client: Client, prompts: PromptSource) -> str:
    """Submit a job that outlasts the measurement; return its id."""
    texts = prompts.take(NUM_ROWS, ROW_TOKENS - 1)  # one less: the end token is added
    body = {
        "name": "background",
        "data": [{"text": text} for text in texts],
        "validation": 0,
        "training": {"epochs": 1000, "batch_size": BATCH_SIZE, "max_length": ROW_TOKENS},
    }
    return str(client.train(body)["id"])


def _wait_for_steps(client: Client, job: str, num_steps: int) -> None:
    limit = time.monotonic() + WITHIN
    while time.monotonic() < limit:
        found = client.job(job)
        if found["error"] is not None:
            raise RuntimeError(f"the job failed: {found['error']}")
        if cast("dict[str, int]", found["progress"])["step"] >= num_steps:
            return
        time.sleep(POLL)
    raise RuntimeError(f"the job did not take {num_steps} steps within {WITHIN:.0f} s")


def _speed(client: Client, job: str, start: datetime, stop: datetime) -> float:
    """Return tokens per second from the first to the last step that ended in the interval; NaN if there are fewer
    than two."""
    with httpx.Client(base_url=client.url, trust_env=False) as http:
        events = http.get(f"/train/{job}/events").raise_for_status().json()
    times = [datetime.fromisoformat(event["at"]) for event in events if event["type"] == "metrics"]
    within = [at for at in times if start <= at <= stop]
    if len(within) < 2:
        return math.nan
    return (len(within) - 1) * BATCH_SIZE * ROW_TOKENS / (within[-1] - within[0]).total_seconds()


if __name__ == "__main__":
    main()
