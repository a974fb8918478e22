"""Many registered adapters with room for a few: random traffic, every answer checked, bounded memory.

    python -m tests.stress.many_adapters --adapters 1000 --pool 16

Adapters are in a real store on disk, for a tiny random base. Each request names one adapter or a blend of two.
Every greedy token is compared with transformers with that blend merged into its weights.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from adapters.lora import MODULES, AdapterRef, LoraConfig, LoraModule, LoraWeights
from adapters.peft.files import PeftAdapter
from adapters.store.store import AdapterStore
from server.engine.engine import Engine
from server.engine.request import GenerationRequest
from server.engine.scheduler import SchedulerLimits
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from tests.kits.engines import GREEDY, Result, build_engine, check_idle, random_adapter
from tests.kits.oracles.hugging_face import assert_greedy, load_reference, logits, merged
from tests.kits.tiny import save_tiny_base

RANK = 8
MAX_AT_ONCE = 24
SHAPES = ((RANK, MODULES), (2 * RANK, MODULES[:3]), (RANK // 2, MODULES), (RANK, MODULES[3:]))
"""Ranks and modules, in rotation: a pool of `n` has room for at least n/2 of the largest."""


@dataclass(frozen=True)
class Report:
    """A run's figures. Bytes are of resident memory, after a fifth of the traffic and at the later peak."""

    num_requests: int
    num_loads: int
    num_evictions: int
    num_resident: int
    stored_bytes: int
    early_rss: int
    peak_rss: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests, all answers right, in {self.seconds:.1f} s: {self.num_loads} loads, "
            f"{self.num_evictions} evictions, {self.num_resident} resident at the end; stored "
            f"{self.stored_bytes / 1e6:.0f} MB, memory {self.early_rss / 1e6:.0f} MB early on, "
            f"{self.peak_rss / 1e6:.0f} MB at its highest"
        )


def publish(base: BaseModel, store: AdapterStore, num: int) -> tuple[list[str], int]:
    """Publish random adapters to the store; return their digests and sizes in bytes."""
    digests, stored = [], 0
    for seed in range(num):
        rank, modules = SHAPES[seed % len(SHAPES)]
        found = random_adapter(base.config.shape, seed, rank=rank, modules=modules)
        config = LoraConfig(rank=rank, alpha=float(rank), target_modules=modules)
        weights = LoraWeights({key: LoraModule(m.a, m.b * m.scaling, 1.0) for key, m in found.modules.items()})
        stored += store.put(PeftAdapter(config, weights))
        digests.append(weights.digest)
    return digests, stored


def traffic(digests: Sequence[str], num_requests: int, vocab: int, rng: random.Random) -> list[GenerationRequest]:
    """Return the traffic: some adapters are popular, each occurs at least once, a fifth of the requests blend
    two."""
    popular = list(digests[: max(len(digests) // 10, 1)])
    chosen = [*digests, *(rng.choice(rng.choice((digests, popular))) for _ in range(num_requests - len(digests)))]
    rng.shuffle(chosen)
    requests = []
    for i, digest in enumerate(chosen):
        weights = {digest: 1.0}
        if rng.random() < 0.2:
            weights = {digest: rng.uniform(-1, 1), rng.choice(digests): rng.uniform(0.1, 1)}
        adapters = tuple(sorted(AdapterRef(name, weight) for name, weight in weights.items()))
        prompt = tuple(rng.randrange(vocab) for _ in range(rng.randint(3, 40)))
        requests.append(
            GenerationRequest(str(i), prompt, replace(GREEDY, max_tokens=rng.randint(1, 10)), adapters)
        )
    return requests


def serve(
    engine: Engine, requests: Sequence[GenerationRequest], rng: random.Random
) -> tuple[list[Result], int, int]:
    """Run all requests through the engine, at most `MAX_AT_ONCE` at a time; return results, early and peak
    memory."""
    process = psutil.Process()
    results = [Result() for _ in requests]
    num_added = num_done = early = peak = 0
    while num_done < len(requests):
        while num_added < len(requests) and num_added - num_done < MAX_AT_ONCE and rng.random() < 0.8:
            engine.add(requests[num_added])
            num_added += 1
        num_steps = engine.num_steps
        outputs = engine.step()
        for output in outputs:
            results[int(output.request_id)].take(output)
            num_done += output.finish_reason is not None
        if engine.num_steps % 20 == 0:
            memory = process.memory_info().rss
            early = memory if num_done * 5 < len(requests) else early
            peak = max(peak, memory)
        if engine.num_steps == num_steps and not outputs:
            time.sleep(0.0005)
    return results, early, peak


def check_answers(
    hugging_face: Path, store: AdapterStore, requests: Sequence[GenerationRequest], results: Sequence[Result]
) -> None:
    reference = load_reference(hugging_face)
    for request, result in zip(requests, results, strict=True):
        assert result.finish_reason == "length", result.error
        with merged(reference, [(store.load(ref.digest), ref.weight) for ref in request.adapters]) as model:
            theirs = logits(model, (*request.prompt_token_ids, *result.token_ids))
        assert_greedy(theirs, len(request.prompt_token_ids), result.token_ids, tolerance=1e-3)


def measure(directory: Path, num_adapters: int, pool: int, num_requests: int, seed: int = 0) -> Report:
    """Run everything under `directory`, which should be empty. Raise AssertionError at the first wrong answer."""
    rng = random.Random(seed)
    hugging_face = save_tiny_base(directory / "tiny")
    base = load_base(resolve_base(str(hugging_face), directory))
    store = AdapterStore(directory / "adapters")
    digests, stored = publish(base, store, num_adapters)
    assert len(set(digests)) == num_adapters
    requests = traffic(digests, num_requests, base.config.vocab_size, rng)
    engine = build_engine(
        base,
        store.load,
        num_blocks=60,
        max_rank=pool * RANK,
        limits=SchedulerLimits(max_num_seqs=16, chunk_size=16),
    )
    started = time.perf_counter()
    results, early, peak = serve(engine, requests, rng)
    seconds = time.perf_counter() - started
    check_idle(engine)
    check_answers(hugging_face, store, requests, results)
    stats = engine.stats
    engine.close()
    return Report(
        num_requests=len(requests),
        num_loads=stats.adapter_loads,
        num_evictions=stats.adapter_evictions,
        num_resident=stats.adapters_resident,
        stored_bytes=stored,
        early_rss=early,
        peak_rss=peak,
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=16, help=f"room for so many of rank {RANK} on all modules")
    parser.add_argument("--requests", type=int, help="default: three for each adapter")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the base is tiny
    with tempfile.TemporaryDirectory() as directory:
        num_requests = arguments.requests or 3 * arguments.adapters
        report = measure(Path(directory), arguments.adapters, arguments.pool, num_requests, arguments.seed)
    sys.stdout.write(f"{report}\n")
    growth = report.peak_rss - report.early_rss
    assert report.num_evictions >= arguments.adapters - report.num_resident
    assert growth < max(report.stored_bytes / 4, 20e6), f"memory grew by {growth / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
