"""Dropout as a function of seeds: what is dropped can be computed again, and does not depend on the batch.

A row's mask depends on its seed (of training seed, step and record) and its module alone: the same in any micro-batch,
however far the row is padded, and again in a recomputed forward pass. A generator per row cannot give that, as what it
draws for a position depends on the size of the whole tensor. Here each element has a hash: k1 f1 + k2 f2 modulo 2**32,
with two keys of its row and position and two of its module and feature. Multilinear hashing (Carter and Wegman, 1979)
makes any two elements independent, which a hash of one key does not. Ten kernels for a linear whatever the number of
rows, four of them on all elements.

Axes: B rows, S positions, F features.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9 - 2**32  # 2**32 over the golden ratio, as i32
MIX = 0x7FEB352D  # odd, of the hash lowbias32


def seed_of(*parts: object) -> int:
    """An i32 seed for `Dropout`, a random function of all parts: seeds that follow a pattern make masks that depend on
    each other, as those of CRC-32 may.
    """
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Drops an element with probability `p`.

    Attributes:
        seeds: i32 [B], one for each row, as `seed_of` gives them.
        features: i32 [2, F] of the module, `feature_keys`.
    """

    p: float
    seeds: Tensor
    features: Tensor

    def mask(self, x: Tensor) -> Tensor:
        """True at what is dropped of x [B, ..., F], in its shape."""
        positions = torch.arange(x[0].numel() // x.shape[-1], dtype=torch.int32, device=x.device)
        first = torch.add(self.seeds[:, None], positions, alpha=GOLDEN).mul_(MIX)[..., None]  # (B, S, 1)
        # Ones instead of the copies of the sign, with which a number and its complement would become one.
        second = (first >> 15).bitwise_or_(-(2**17)).bitwise_xor_(first)
        bits = torch.mul(first, self.features[0]).addcmul_(second, self.features[1])  # (B, S, F), uniform in i32
        return (bits < int(self.p * 2**32) - 2**31).view(x.shape)


def feature_keys(key: int, count: int) -> Tensor:
    """i32 [2, count]: two hashes of each feature's number for a module with this key."""
    low, numbers = 2**32 - 1, torch.arange(2 * count).view(2, count)
    x = (numbers * GOLDEN) & low
    x = (((x ^ (x >> 16)) * MIX) & low) ^ key  # lowbias32, the key within
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return ((x ^ (x >> 16)) - 2**31).to(torch.int32)
