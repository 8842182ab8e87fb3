"""Which products of bf16 tensors a CPU takes in bf16 and which in fp32: whichever it has the faster kernel for.

torch (2.11 to 2.13) hands bf16 products on x86 to oneDNN where the CPU has AVX-512 or AVX-NE-CONVERT (`use_mkldnn_bf16_
matmul` in aten/src/ATen/native/mkldnn/Matmul.cpp), and else to loops of its own (cpu/BlasKernel.cpp): a dot product for
each element of x W^T, which is well vectorised, and strided scalar sums, on one thread, for all other products. oneDNN
in turn emulates bf16 where the CPU lacks its instructions. fp32 products are always MKL's. Timings of each, and where
the limits of `choose` come from: benchmarks/LOG.md.

A product taken in fp32 has the exact bf16 inputs, is summed in fp32 and rounded once, as bf16 kernels do. The choice
depends on the CPU and on shapes, never on a measurement: a run gives the same bits each time. Anything but bf16 on an
x86 CPU goes straight to torch.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

EMULATED_ROWS, EMULATED_WIDTH = 16, 256  # from here on fp32 is faster than oneDNN without bf16 instructions
DOT_ROWS = 8  # from here on fp32 is faster than torch's dot products

# x W^T, its gradients for x and for W, the gradient of attention, and a convolution.
Direction = Literal["forward", "input_grad", "weight_grad", "attention_grad", "convolution"]


_native: ContextVar[bool] = ContextVar("native", default=False)


@dataclasses.dataclass(frozen=True)
class CPU:
    """What decides about bf16 products.

    Attributes:
        x86: on other architectures torch's own choice is taken.
        onednn_bf16: whether torch hands them to oneDNN: AVX-512 (BW, VL, DQ) or AVX-NE-CONVERT, and not switched off by
            ONEDNN_MAX_CPU_ISA.
        bf16_instructions: AVX512_BF16 or AMX.
    """

    x86: bool
    onednn_bf16: bool
    bf16_instructions: bool


@cache
def this_cpu() -> CPU:
    """The CPU that this process runs on."""
    # Not in every torch: there a CPU with AVX-512 is taken to have the instructions.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    onednn = x86 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return CPU(x86, onednn, bool(known.get("avx512_bf16") or known.get("amx_bf16")))


def choose(cpu: CPU, direction: Direction, rows: int, weight: tuple[int, ...]) -> Literal["native", "upcast"]:
    """How to take a bf16 product with `rows` rows of x (or of its gradient) and a weight [out, in]."""
    if not cpu.x86 or (cpu.onednn_bf16 and cpu.bf16_instructions):
        return "native"
    if cpu.onednn_bf16:
        matrix = direction in ("forward", "input_grad") and min(weight) >= EMULATED_WIDTH
        return "upcast" if matrix and rows >= EMULATED_ROWS else "native"
    return "native" if direction == "forward" and rows < DOT_ROWS else "upcast"


def upcasts(direction: Direction, x: Tensor, weight: Tensor) -> bool:
    """Whether to take the product of x [n, ...] and a weight in fp32 on this CPU."""
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.bfloat16:
        return False
    return not _native.get() and choose(this_cpu(), direction, len(x), tuple(weight.shape)) == "upcast"


@contextmanager
def native_products() -> Iterator[None]:
    """Within this context torch's own choice is taken: to count on a CPU what another device saves for backward."""
    token = _native.set(True)
    try:
        yield
    finally:
        _native.reset(token)
