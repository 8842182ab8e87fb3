"""torch's CUDA allocator: how it is set up, and what it takes for what is asked of it.

After c10/cuda/CUDACachingAllocator.cpp of torch 2.9 to 2.13: sizes are rounded up to 512 bytes. Up to 1 MiB they share
segments of 2 MiB, below 10 MiB segments of 20 MiB, and larger ones have segments of their own, in multiples of 2 MiB.
An expandable segment grows instead, one for the small and one for all others, so that neither their ends nor the holes
of freed blocks are lost. WSL and Windows have none.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIB = 2**20
BLOCK, SMALL, SMALL_SEGMENT, MIDDLE, MIDDLE_SEGMENT, LARGE_STEP = 512, MIB, 2 * MIB, 10 * MIB, 20 * MIB, 2 * MIB
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9
HANDLES = 2 * 2  # of cuBLAS and cuBLASLt, each for the thread of the forward and that of the backward pass


def is_wsl_or_windows() -> bool:
    return platform.system() == "Windows" or "microsoft" in platform.release().lower()


def use_expandable_segments() -> None:
    """Ask for expandable segments where there are any, unless a person has set the allocator up.

    The variable is read when the first CUDA memory is asked for: call this before.
    """
    if platform.system() == "Linux" and not is_wsl_or_windows() and not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = "expandable_segments:True"


def expandable_segments() -> bool:
    """Whether the scripts have them on this machine: as a person has set, else where there are any."""
    said = [os.environ[name] for name in VARIABLES if name in os.environ]
    if said:
        return "expandable_segments:true" in said[0].lower().replace(" ", "")
    return platform.system() == "Linux" and not is_wsl_or_windows()


def reserved_bytes(sizes: Iterable[int], expandable: bool) -> int:
    """What is reserved for allocations of these sizes, made in this order, none of which is freed."""
    blocks = [round_up(size, BLOCK) for size in sizes]
    if expandable:
        small = sum(size for size in blocks if size <= SMALL)
        return round_up(small, SMALL_SEGMENT) + round_up(sum(blocks) - small, MIDDLE_SEGMENT)
    total, free = 0, {True: list[int](), False: list[int]()}  # whether small -> room left in segments
    for size in blocks:
        rooms = free[size <= SMALL]
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(room := min(fitting))
        else:
            total += (room := segment(size))
        # The rest of a segment is split off where it is worth it; else nobody has it.
        if room - size >= (BLOCK if size <= SMALL else SMALL + 1):
            rooms.append(room - size)
    return total


def segment(size: int) -> int:
    """Bytes of a new segment for a block of this size."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return MIDDLE_SEGMENT if size < MIDDLE else round_up(size, LARGE_STEP)


def round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def cublas_workspaces(device: torch.device) -> int:
    """Bytes that cuBLAS keeps, of this process's handles: 8.125 MiB each, on Hopper and later 32. An estimate: how many
    handles come into being depends on the products, and a card that is elsewhere is taken for one before Hopper.
    """
    import torch  # here alone: the scripts set the variable before they import it

    here = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    hopper = here and torch.cuda.get_device_capability(device) >= (9, 0)
    return HANDLES * (32 * MIB if hopper else 8 * MIB + MIB // 8)
