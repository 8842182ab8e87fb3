"""Which kernels MKL chooses in this process."""

from __future__ import annotations

import torch


def choose_kernels() -> None:
    """Call with one thread the functions that several threads would otherwise call first in this process.

    MKL chooses the kernel of an elementwise function within its first call. Where threads share that call, one of them
    may take a kernel good to 12 bits: cosines were off by 1.5e-4 (pytorch/pytorch#188792; benchmarks/LOG.md). Rotary
    angles need the first two, AdamW the last.
    """
    for function in (torch.cos, torch.sin, torch.sqrt):
        function(torch.ones(1))
