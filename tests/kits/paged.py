"""Logits at every position of some sequences, through the paged cache, in random chunks and batches."""

import random
from collections.abc import Sequence as Seq

import torch

from server.engine.backend import PagedCache
from server.engine.kv_cache import BlockManager
from server.engine.request import GenerationRequest
from server.engine.sequence import Chunk, Sequence
from server.engine.torch_backend import PagedAttention
from server.model.lora_batch import LoraBatch, Parts, TokenRun
from server.model.rank_rows import RankRows
from server.model.smollm import NoAdapters, SmolLM

MAX_CHUNK = 7


@torch.inference_mode()
def paged_logits(
    model: SmolLM,
    token_ids: Seq[Seq[int]],
    *,
    seed: int = 0,
    block_size: int = 4,
    num_prompt_tokens: int = 0,
    rows: RankRows | None = None,
    parts: Seq[Parts] | None = None,
) -> list[torch.Tensor]:
    """Return logits (tokens, vocab) for each sequence. Its first `num_prompt_tokens` tokens are one chunk.

    In each step every sequence computes nothing, one token (a decode), or a few. Blocks are allocated in a random
    order and contain arbitrary old values.
    """
    rng = random.Random(seed)
    sequences = [
        Sequence(GenerationRequest(str(i), tuple(ids)), i, 0.0, block_size) for i, ids in enumerate(token_ids)
    ]
    num_blocks = sum(len(ids) // block_size + 1 for ids in token_ids) + 1
    manager = BlockManager(num_blocks, block_size)
    shuffled = list(manager._free)
    rng.shuffle(shuffled)
    for block in shuffled:
        manager._free.move_to_end(block)
    cache = PagedCache(model.config, num_blocks, block_size, model.dtype, model.device)
    for tensor in (cache.k, cache.v):
        tensor[:, 1:] = torch.randn(tensor[:, 1:].shape).to(tensor)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(sequence.num_computed_tokens < sequence.num_tokens for sequence in sequences):
        chunks = []
        for sequence in sequences:
            done, total = sequence.num_computed_tokens, sequence.num_tokens
            new = (
                num_prompt_tokens
                if done < num_prompt_tokens
                else rng.choice((0, 1, 1, 1, rng.randint(2, MAX_CHUNK)))
            )
            if new and done < total:
                stop = min(done + new, total)
                assert manager.reserve(sequence, stop)
                chunks.append(Chunk(sequence, done, stop))
        if not chunks:
            continue
        decodes = [chunk for chunk in chunks if chunk.is_decode]
        prefills = [chunk for chunk in chunks if not chunk.is_decode]
        ordered = [*decodes, *prefills]
        adapters = NoAdapters() if rows is None else LoraBatch(rows, _runs(ordered, parts or []))
        hidden = model.forward(
            torch.tensor([t for c in ordered for t in c.sequence.token_ids[c.start : c.stop]]),
            torch.tensor([p for c in ordered for p in range(c.start, c.stop)]),
            PagedAttention(cache, decodes, prefills),
            adapters,
        )
        logits = model.logits(hidden)
        for chunk, part in zip(ordered, logits.split([c.stop - c.start for c in ordered]), strict=True):
            found[chunk.sequence.index].append(part)
            chunk.sequence.num_computed_tokens = chunk.stop
    return [torch.cat(part) for part in found]


def _runs(chunks: Seq[Chunk], parts: Seq[Parts]) -> list[TokenRun]:
    runs, start = [], 0
    for chunk in chunks:
        stop = start + chunk.stop - chunk.start
        if parts[chunk.sequence.index]:
            runs.append(TokenRun(start, stop, parts[chunk.sequence.index]))
        start = stop
    return runs
