"""Random streams that are named, not continued: what is drawn depends on the name alone, on no history."""

import hashlib

import torch


def stream(*name: int | str) -> torch.Generator:
    """A fresh CPU generator for `name`, such as ("init", seed, layer, module)."""
    data = "|".join(map(str, name)).encode()
    seed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(seed)
