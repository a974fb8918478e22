"""Zipf load over many registered adapters, few of them resident, with a check of the answers.

The same prompts go to the base in turn, for the ratio. Then the server restarts with empty caches and answers the
same requests with every adapter resident: these answers are the references. In bf16, other sequences in the batch
change the last bits of logits, so an answer may diverge from its reference where the two likeliest tokens are
nearly tied. Divergence anywhere else is wrong. The base's answers are the control: they must be found wrong, or
the check is blind.
"""

import random
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import torch

from benchmarks.command import Say
from benchmarks.measure import Figures, percentile
from benchmarks.prompts import PromptSource
from benchmarks.serving.adapter_files import Sizes, write_adapter
from benchmarks.serving.load import TIMEOUT, Answer, drive, summarize
from benchmarks.serving.systems.server_process import Server, ServerConfig
from benchmarks.serving.systems.wires import Part, Request, Smolora

NEAR_TIE = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.05}
"""Nats between two tokens that count as tied, by dtype: logits are of the order of tens, rounded to the dtype's
precision."""

Verdict = str
""""exact", "tie" (diverged from the reference at a near tie) or "wrong"."""


@dataclass(frozen=True)
class ManyConfig:
    num_registered: int
    num_pooled: int  # adapters that have room at once
    exponent: float  # of Zipf's law: the k-th most popular adapter is drawn with a weight of 1 / k**exponent
    num_streams: int
    num_requests: int  # per stream and round
    num_rounds: int
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Many:
    """Results. Figures have an entry for each round."""

    config: ManyConfig
    base: tuple[Figures, ...]
    mixed: tuple[Figures, ...]
    num_distinct: int  # distinct adapters requested
    loads: int
    evictions: int
    most_resident: int
    peak_rss: int
    verdicts: dict[Verdict, int]
    control: dict[Verdict, int]  # verdicts on the base's answers, which must be wrong

    @property
    def load(self) -> str:
        config = self.config
        return f"{config.num_registered:,} registered, Zipf {config.exponent:g}, pool of {config.num_pooled}"


@dataclass(frozen=True)
class Token:
    """A token of a reference: its bytes, and the likeliest alternatives with their distance from it in nats."""

    content: bytes
    others: tuple[tuple[bytes, float], ...]


def measure(
    config: ManyConfig, server_config: ServerConfig, sizes: Sizes, prompts: PromptSource, scratch: Path, say: Say
) -> Many:
    """Measure on servers of its own. `server_config` has room for the pool."""
    size = config.num_streams * config.num_requests
    rounds = [prompts.take(size, config.prompt_tokens) for _ in range(config.num_rounds)]
    draw = random.Random(0)
    weights = [1 / (rank + 1) ** config.exponent for rank in range(config.num_registered)]
    names = [[f"many-{index}" for index in draw.choices(range(len(weights)), weights, k=size)] for _ in rounds]
    base_answers: list[Answer] = []
    answers: list[Answer] = []
    base: list[Figures] = []
    mixed: list[Figures] = []
    wire = Smolora()
    with Server(server_config) as server:
        _register(server, config.num_registered, sizes, scratch, say)
        most_resident = 0
        for index, (texts, adapters) in enumerate(zip(rounds, names, strict=True)):
            say(f"{config.num_registered} adapters, round {index + 1} of {config.num_rounds}")
            for is_base in (True, False) if index % 2 == 0 else (False, True):
                requests = [
                    Request(text, () if is_base else (Part(name),), config.max_tokens)
                    for text, name in zip(texts, adapters, strict=True)
                ]
                streams = [requests[stream :: config.num_streams] for stream in range(config.num_streams)]
                found = drive(server.url, wire, streams)
                (base_answers if is_base else answers).extend(found)
                (base if is_base else mixed).append(Figures.of(summarize(found)))
                most_resident = max(most_resident, int(server.metrics()["smolora_adapters_resident"]))
        counted = server.metrics()
        server.stop()
        peak = server.peak_rss
    say("answering the same requests again, every adapter resident")
    with Server(server_config) as server:
        references = _references(server, [answer.request for answer in answers], config)
        server.stop()
    near = NEAR_TIE[server_config.dtype]
    from_base = {answer.request.prompt: answer.text for answer in base_answers}
    pairs = [(answer.text, references[answer.request]) for answer in answers]
    control = [(from_base[answer.request.prompt], references[answer.request]) for answer in answers]
    return Many(
        config,
        tuple(base),
        tuple(mixed),
        len({answer.request.parts for answer in answers}),
        int(counted["smolora_adapter_loads_total"]),
        int(counted["smolora_adapter_evictions_total"]),
        most_resident,
        peak,
        _count(pairs, near),
        _count(control, near),
    )


def judge(text: str, reference: Sequence[Token], near: float) -> Verdict:
    """Compare `text` with the reference up to its length; truncated characters are ignored."""
    whole, cut, _ = text.partition("\ufffd")
    rest = whole.encode()
    level = False  # whether the previous token was a near tie
    for token in reference:
        was_level, level = level, any(gap <= near and rest.startswith(other) for other, gap in token.others)
        if cut and token.content.startswith(rest):
            return "exact"
        if not rest.startswith(token.content):
            return "tie" if level or was_level else "wrong"
        rest = rest[len(token.content) :]
    return "exact" if not rest else "wrong"


def _count(pairs: Sequence[tuple[str, Sequence[Token]]], near: float) -> dict[Verdict, int]:
    verdicts = [judge(text, reference, near) for text, reference in pairs]
    return {verdict: verdicts.count(verdict) for verdict in ("exact", "tie", "wrong")}


def _register(server: Server, count: int, sizes: Sizes, scratch: Path, say: Say) -> None:
    """Register the adapters in bf16 (10 GB for a thousand); delete each file once it is uploaded."""
    for index in range(count):
        if index % 50 == 0:
            say(f"registering adapters: {index} of {count}")
        directory = write_adapter(scratch / f"many-{index}", sizes, seed=10_000 + index, dtype=torch.bfloat16)
        server.upload(f"many-{index}", directory)
        shutil.rmtree(directory)


def _references(server: Server, requests: Sequence[Request], config: ManyConfig) -> dict[Request, list[Token]]:
    """Answer the requests again, for as many adapters at a time as fit together."""
    by_adapter: dict[tuple[Part, ...], list[Request]] = {}
    for request in requests:
        by_adapter.setdefault(request.parts, []).append(request)
    adapters = list(by_adapter)
    size = max(config.num_pooled // 2, 1)
    references: dict[Request, list[Token]] = {}
    wire = Smolora()
    with (
        httpx.Client(base_url=server.url, timeout=TIMEOUT, trust_env=False) as client,
        ThreadPoolExecutor(config.num_streams) as threads,
    ):

        def answer(request: Request) -> list[Token]:
            body = wire.body(replace(request, logprobs=5)) | {"stream": False}
            response = client.post(wire.path, json=body).raise_for_status()
            return [_token(entry) for entry in response.json()["choices"][0]["logprobs"]]

        for start in range(0, len(adapters), size):
            group = adapters[start : start + size]
            list(threads.map(answer, [Request("A", adapter, 1) for adapter in group]))  # loads them
            again = [request for adapter in group for request in by_adapter[adapter]]
            references.update(zip(again, threads.map(answer, again), strict=True))
    return references


def _token(entry: dict[str, object]) -> Token:
    top = entry["top"]
    chosen = entry["logprob"]
    assert isinstance(top, list)
    assert isinstance(chosen, float)
    own = _content(entry)
    others = [(_content(other), chosen - float(other["logprob"])) for other in top]
    return Token(own, tuple(other for other in others if other[0] != own))


def _content(entry: dict[str, object]) -> bytes:
    content = entry["bytes"]
    assert isinstance(content, list)
    return bytes(content)


def summary(many: Many) -> str:
    """Return one line for people."""
    verdicts = many.verdicts
    loaded = f"{many.loads} loads, {many.evictions} evictions, at most {many.most_resident} resident"
    ttft = percentile([figures.ttft_p50 for figures in many.mixed], 50)
    return (
        f"{many.num_distinct} of {many.config.num_registered} adapters were asked for ({loaded}; "
        f"TTFT p50 {ttft:.2f} s, peak RSS {many.peak_rss / 1e9:.2f} GB): "
        f"{verdicts['exact']} answers equal the resident re-run's, {verdicts['tie']} leave it at a near tie, "
        f"{verdicts['wrong']} are wrong. Of the base's answers to the same prompts the check finds "
        f"{many.control['wrong']} of {sum(many.control.values())} wrong."
    )
