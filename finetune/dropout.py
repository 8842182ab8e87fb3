"""Dropout as a function of seeds: what is dropped can be computed again, and does not depend on the batch.

A row's mask depends on its seed (of training seed, step and record) and its module alone: the same in any micro-batch,
however far the row is padded, and again in a recomputed forward pass. A generator per row cannot give that, as what it
draws for a position depends on the size of the whole tensor. Here each element has a 32-bit hash of (seed, position,
feature, module), by multiplication and xor on the whole batch at once: eleven kernels for a linear whatever the number
of rows, four of them on all elements.

Axes: B rows, S positions, F features.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9 - 2**32  # 2**32 over the golden ratio, as i32
MIX = 0x7FEB352D  # odd, of the hash lowbias32


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Drops an element with probability `p`.

    Attributes:
        seeds: i32 [B], one for each row.
        features: i32 [F] of the module, `feature_keys`.
    """

    p: float
    seeds: Tensor
    features: Tensor

    def mask(self, x: Tensor) -> Tensor:
        """True at what is dropped of x [B, ..., F], in its shape."""
        positions = torch.arange(x[0].numel() // x.shape[-1], dtype=torch.int32, device=x.device)
        keys = torch.add(self.seeds[:, None], positions, alpha=GOLDEN).mul_(MIX)
        shifted = (keys >> 15).bitwise_and_(2**17 - 1)  # without the copies of the sign
        keys = keys.bitwise_xor_(shifted)[..., None]  # (B, S, 1)
        # An odd factor of each position's own: with one factor for all, a few pairs of positions would be alike.
        bits = torch.bitwise_xor(keys, self.features).mul_(keys | 1)  # (B, S, F), uniform in i32
        return (bits < int(self.p * 2**32) - 2**31).view(x.shape)


def feature_keys(key: int, count: int) -> Tensor:
    """i32 [count]: a hash of each feature's number for a module with this key.

    Any two of 65,536 differ in their lower 16 bits: in a product, bits have an effect on higher ones only.
    """
    low, numbers = 2**32 - 1, torch.arange(count)
    x = (numbers * GOLDEN + key) & low
    x = ((x ^ (x >> 16)) * MIX) & low  # lowbias32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    x = (x & ~0xFFFF) | ((numbers * 0x9E37 + key) & 0xFFFF)
    return (x - 2**31).to(torch.int32)
