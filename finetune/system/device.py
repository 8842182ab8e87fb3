"""Where a run computes, and in what: found, and refused with the reason where it cannot work."""

from __future__ import annotations

import gc
import re

import torch

OUT_OF_MEMORY = re.compile(
    "|".join(
        (
            r"(CUDA|HIP|XPU|MPS backend) out of memory",
            r"(CUDA|HIP) error: out of memory",  # from a call that is not the allocator's
            r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS)_STATUS_\w*ALLOC(ATION)?_FAILED",  # a handle, a workspace
            r"DefaultCPUAllocator: (can't allocate|not enough) memory",
        )
    )
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pick_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu; any other name is taken at its word.

    Raises:
        ValueError: the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if not is_here(device):
        raise ValueError(f"device {name!r} is not there: this machine has {counts()}; device=auto takes what there is")
    return device


def counts() -> dict[str, int]:
    """How many devices of each type this machine has."""
    return {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}


def is_here(device: torch.device) -> bool:
    return (device.index or 0) < counts().get(device.type, 0)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name. Raises ValueError for float16, and for bfloat16 on a card that has none."""
    if name not in DTYPES:
        raise ValueError(
            f"dtype {name!r}: expected one of {', '.join(DTYPES)}; Gemma's activations overflow in float16"
        )
    asked = device.type == "cuda" and is_here(device)  # a card that is elsewhere cannot be
    if name == "bfloat16" and asked and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16, and Gemma's activations overflow in float16. What "
            "works on it: float32 (twice the memory: 11.7 GB of weights for the 3B), or the CPU with bfloat16"
        )
    return DTYPES[name]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in whichever of their ways torch, a library or Python say it.

    Beside torch.OutOfMemoryError and MemoryError these are RuntimeErrors (torch.AcceleratorError is one) that only
    their words tell from others.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that torch adds; its type, where it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def free_memory(device: torch.device) -> None:
    """Give back what a failed attempt has left behind; outside of the except block, for the error holds on to it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
