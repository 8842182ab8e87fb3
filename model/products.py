"""Matrix products of bf16 tensors on CPUs: each in bf16 or in fp32, whichever this CPU has the faster kernel for.

torch (2.11 to 2.13) hands bf16 products on x86 to oneDNN where the CPU has AVX-512 or AVX-NE-CONVERT (`use_mkldnn_bf16_
matmul` in aten/src/ATen/native/mkldnn/Matmul.cpp), and else to loops of its own (cpu/BlasKernel.cpp): a dot product for
each element of x W^T, which is well vectorised, and strided scalar sums, on one thread, for all other products. oneDNN
in turn emulates bf16 where the CPU lacks its instructions. fp32 products are always MKL's. Timings of each, and where
the limits of `choose` come from: benchmarks/LOG.md.

A product taken in fp32 has the exact bf16 inputs, is summed in fp32 and rounded once, as bf16 kernels do; the weight
is cast a chunk at a time. The choice depends on the CPU and on shapes, never on a measurement: a run gives the same
bits each time. Anything but bf16 on an x86 CPU goes straight to torch.

Axes: n rows, in/out features of a weight [out, in]; for attention B batch, h heads, S queries, T keys, d head width.
"""

from __future__ import annotations

import dataclasses
import platform
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CHUNK = 2**22  # elements cast at a time
EMULATED_ROWS, EMULATED_WIDTH = 16, 256  # from here on fp32 is faster than oneDNN without bf16 instructions
DOT_ROWS = 8  # from here on fp32 is faster than torch's dot products

# x W^T, its gradients for x and for W, the gradient of attention, and a convolution.
Direction = Literal["forward", "input_grad", "weight_grad", "attention_grad", "convolution"]


@dataclasses.dataclass(frozen=True)
class CPU:
    """What decides about bf16 products.

    Attributes:
        x86: no other architecture is known here; those keep torch's own choice.
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
    return choose(this_cpu(), direction, len(x), tuple(weight.shape)) == "upcast"


def chunk_rows(weight: Tensor) -> int:
    """Rows of a weight [out, in] that are cast at a time."""
    return min(len(weight), max(1, CHUNK // weight.shape[1]))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in] W^T + b, [n, out], for use where there is no autograd."""
    if not upcasts("forward", x, weight):
        return F.linear(x, weight, bias)
    return add_product(x.new_zeros(len(x), len(weight)) if bias is None else bias.repeat(len(x), 1), x, weight)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """out [n, out] += x [n, in] W^T, in place."""
    if not upcasts("forward", x, weight):
        return out.addmm_(x, weight.t())
    x, size = x.float(), chunk_rows(weight)
    cast, summed = torch.empty(size, weight.shape[1]), torch.empty(len(x), size)
    for columns, chunk in zip(out.split(size, dim=1), weight.split(size), strict=True):
        total = summed[:, : len(chunk)].copy_(columns)
        columns.copy_(total.addmm_(x, cast[: len(chunk)].copy_(chunk).t()))
    return out


def grad_of_input(grad: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """The gradient of x W^T for x: grad [n, out] W, [n, in]; added to `onto` [n, in] if there is one."""
    if not upcasts("input_grad", grad, weight):
        return grad @ weight if onto is None else onto.addmm(grad, weight)
    total = torch.zeros(len(grad), weight.shape[1]) if onto is None else onto.float()
    size = chunk_rows(weight)
    cast = torch.empty(size, weight.shape[1])
    for columns, chunk in zip(grad.split(size, dim=1), weight.split(size), strict=True):
        total.addmm_(columns.float(), cast[: len(chunk)].copy_(chunk))
    return total.to(grad.dtype)


def grad_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x W^T for W: grad [n, out]^T x [n, in], [out, in]."""
    if not upcasts("weight_grad", grad, x):
        return grad.t() @ x
    total = torch.zeros(grad.shape[1], x.shape[1])
    size = max(1, CHUNK // max(total.shape))
    for left, right in zip(grad.split(size), x.split(size), strict=True):
        total.addmm_(left.float().t(), right.float())
    return total.to(grad.dtype)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), flat = ctx.saved_tensors, grad.flatten(0, -2)
        grad_x = None if weight is None else grad_of_input(flat, weight).view(*grad.shape[:-1], -1)
        grad_weight = None if x is None else grad_of_weight(flat, x.flatten(0, -2))
        return grad_x, grad_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] W^T + b, [..., out], with gradients for all three."""
    if not any(upcasts(direction, x.flatten(0, -2), weight) for direction in ("forward", "input_grad", "weight_grad")):
        return F.linear(x, weight, bias)
    output: Tensor = _Linear.apply(x, weight, bias)
    return output


class Linear(nn.Linear):
    """A linear layer whose products are taken as `choose` says."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """A convolution, taken in fp32 where torch's own bf16 loops would take it."""

    def forward(self, x: Tensor) -> Tensor:
        if not upcasts("convolution", x, self.weight):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)


class _Attention(Function):
    """Saves its inputs alone; the gradient comes from attention recomputed in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, bias = ctx.saved_tensors
        with torch.enable_grad():
            q, k, v = (tensor.float().requires_grad_() for tensor in saved)
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.float())
        grads = torch.autograd.grad(output, (q, k, v), grad.float())
        return *(each.to(grad.dtype) for each in grads), None


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, [B, h, S, d]; q [B, h, S, d], k, v [B, h, T, d], bias [B, h, S, T], for which
    there is no gradient.
    """
    if not upcasts("attention_grad", q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    output: Tensor = _Attention.apply(q, k, v, bias)
    return output
