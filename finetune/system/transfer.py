"""From host to device: page-locked buffers, and many tensors in one copy that the host does not wait for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finetune.system.device import first_line

ALIGNED = 64  # bytes; where a tensor begins in a buffer, good for every dtype and vector width


def to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """CPU tensors on the device, all in one copy; the host goes on meanwhile where its memory is page-locked.

    The buffer may be dropped at once: torch's host allocator keeps the memory until the copy is done.
    """
    if device.type == "cpu":
        return dict(tensors)
    values = list(tensors.values())
    buffer = host_buffer(packed_size(values), device)
    for view, value in zip(views(buffer, values), values, strict=True):
        view.copy_(value)
    return dict(zip(tensors, views(buffer.to(device, non_blocking=True), values), strict=True))


def host_buffer(size: int, device: torch.device) -> Tensor:
    """u8 [size] in host memory, page-locked where `device` copies from such memory while the host goes on.

    Page-locked memory is scarce on some systems (WSL, containers with a low `ulimit -l`): without it copies are slower,
    and that is said once.
    """
    if device.type in ("cpu", "mps"):  # mps: the same memory
        return torch.empty(size, dtype=torch.uint8)
    try:
        return page_locked(size)
    except RuntimeError as error:
        warnings.warn(f"no page-locked host memory ({first_line(error)}): copies to {device} are slower", stacklevel=2)
        return torch.empty(size, dtype=torch.uint8)


def page_locked(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def packed_size(tensors: Sequence[Tensor]) -> int:
    """Bytes of a buffer that holds all of them."""
    return sum(aligned(tensor.nbytes) for tensor in tensors)


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a buffer u8 [n], one after the other, of the shapes and dtypes of these tensors."""
    made, start = [], 0
    for tensor in like:
        made.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += aligned(tensor.nbytes)
    return made


def aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
