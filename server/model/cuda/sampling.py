"""The choice of a token: the likeliest, or one drawn with Gumbel noise as `server.engine.sampling` does."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: ANN001, ANN201, N803
import torch
import triton
import triton.language as tl


@triton.jit
def gumbel_argmax(logits, words, tokens, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """tokens (rows,) = argmax of logits (rows, VOCAB) / temperature + noise; temperature 0: of the logits alone.

    words (rows, 3) int32 has the bits of a row's temperature, and the two words of its noise key. The noise is a
    hash of the key and the token id. The lowest of equal tokens is chosen. A row gets -1 if it has a NaN, or if
    the chosen logit is infinite. Grid: (rows,).
    """
    row = tl.program_id(0)
    temperature = tl.load(words + row * 3).to(tl.float32, bitcast=True)
    key0 = tl.load(words + row * 3 + 1).to(tl.uint32, bitcast=True)
    key1 = tl.load(words + row * 3 + 2).to(tl.uint32, bitcast=True)
    own = logits + row.to(tl.int64) * VOCAB
    best = float("-inf")
    token = 0
    num_nan = 0
    for start in range(0, VOCAB, BLOCK):
        t = start + tl.arange(0, BLOCK)
        mask = t < VOCAB
        score = tl.load(own + t, mask=mask, other=float("-inf"))
        num_nan += tl.sum((score != score).to(tl.int32), 0)
        if temperature > 0:
            h = t.to(tl.uint32) ^ key0
            h = (h ^ (h >> 16)) * 0x7FEB352D
            h = h ^ key1
            h = (h ^ (h >> 15)) * 0x846CA68B
            h = h ^ (h >> 16)
            uniform = ((h >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
            score = tl.where(mask, score / temperature - tl.log(-tl.log(uniform)), float("-inf"))
        top = tl.max(score, 0)
        lowest = tl.min(tl.where(score == top, t, VOCAB), 0)
        if top > best:
            best = top
            token = lowest
    chosen = tl.load(own + token)
    is_number = (num_nan == 0) & (tl.abs(chosen) < float("inf"))
    tl.store(tokens + row, tl.where(is_number, token, -1))


def gumbel_argmax_in_torch(
    logits: torch.Tensor, words: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor
) -> None:
    """Take the noise (rows, vocab) of the keys, which `server.engine.sampling.gumbel` computes."""
    temperatures = words[:, 0].contiguous().view(torch.float32)
    is_drawn = temperatures[:, None] > 0
    scores = torch.where(is_drawn, logits / temperatures.where(temperatures > 0, 1)[:, None] + noise, logits)
    best = scores.argmax(-1)  # prefers NaN to any number
    is_number = logits.gather(1, best[:, None])[:, 0].isfinite()
    tokens.copy_(best.where(is_number, -1))
