"""Operations that keep for the backward pass only what it cannot cheaply compute again, and do not dawdle.

Each replaces plain autograd where that keeps more: an RMSNorm its input and one number a row instead of fp32 copies of
both factors, a gated activation its two inputs instead of those and what lies between. Values and gradients are the
same; arithmetic is in fp32 (fp64 for fp64 inputs), rounded once.

Axes: D hidden, F intermediate; leading axes are free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

# Not in every torch: then bf16 is taken to be good.
CPU: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
EMULATES_BF16 = CPU.get("architecture") == "x86_64" and not (CPU.get("avx512_bf16") or CPU.get("amx_bf16"))
PART = 2**22  # elements of a weight cast at a time
ENOUGH = 16  # rows of x from which on that is faster (benchmarks/LOG.md)


def choose_kernels() -> None:
    """Call, by one thread, what else several threads would call first in this process.

    MKL chooses the kernel of an elementwise function within its first call. Where threads share that call, one of them
    may take a kernel good to 12 bits: cosines were off by 1.5e-4 (pytorch/pytorch#188792; benchmarks/LOG.md). Rotary
    angles need the first two, AdamW the last.
    """
    for function in (torch.cos, torch.sin, torch.sqrt):
        function(torch.ones(1))


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide(x) * inverse * (1.0 + wide(weight))).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed, grad_x, grad_weight = wide(x) * inverse, None, None
        if ctx.needs_input_grad[1]:
            grad_weight = (wide(grad) * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = wide(grad) * (1.0 + wide(weight))
            grad_x = (inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True))).to(x.dtype)
        return grad_x, grad_weight, None


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return grad_gate, gelu(gate, approximate="tanh").mul_(grad)


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        flat = x.flatten(0, -2)
        start = torch.zeros(len(flat), len(weight), dtype=x.dtype) if bias is None else bias.repeat(len(flat), 1)
        return add_product(start, flat, weight).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return product(grad.flatten(0, -2), ctx.weight).view(*grad.shape[:-1], -1), None, None


class Linear(nn.Linear):
    """A linear layer that takes a bf16 product in fp32 where the CPU is slow in bf16 and the weight is not learning."""

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if learns or not is_slow(x, self.weight):
            return super().forward(x)
        output: Tensor = _Product.apply(x, self.weight, self.bias)
        return output


def is_slow(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., in] times a weight is faster in fp32 than in bf16: on an x86 CPU without bf16 instructions, where
    the rows are enough to make up for the cast.
    """
    enough = x.device.type == "cpu" and x.numel() >= ENOUGH * x.shape[-1]
    return EMULATES_BF16 and enough and x.dtype == weight.dtype == torch.bfloat16


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """out [n, out] += x [n, in] W^T, in place; summed in fp32 and rounded once where that is faster."""
    if not is_slow(x, weight):
        return out.addmm_(x, weight.t())
    x, size = x.float(), rows_of_a_part(weight)
    cast, summed = torch.empty(size, weight.shape[1]), torch.empty(len(x), size)
    for columns, part in zip(out.split(size, dim=1), weight.split(size), strict=True):
        columns += torch.mm(x, cast[: len(part)].copy_(part).t(), out=summed[:, : len(part)])
    return out


def rows_of_a_part(weight: Tensor) -> int:
    return min(len(weight), max(1, PART // weight.shape[1]))


def product(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [n, out] times W [out, in]: the gradient of x W^T for x, [n, in]."""
    if not is_slow(grad, weight):
        return grad @ weight
    total, size = torch.zeros(len(grad), weight.shape[1]), rows_of_a_part(weight)
    cast = torch.empty(size, weight.shape[1])
    for columns, part in zip(grad.split(size, dim=1), weight.split(size), strict=True):
        total.addmm_(columns.float(), cast[: len(part)].copy_(part))
    return total.to(grad.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight) over the last axis (arXiv 1910.07467; the 1 + is Gemma's), [..., D] in x's dtype."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up (arXiv 2002.05202), gelu in its tanh form; [..., F]."""
    product: Tensor = _Gated.apply(gate, up)
    return product


@contextmanager
def remade(tensor: Tensor, make: Callable[[], Tensor], checkpointed: bool) -> Iterator[None]:
    """Within this context whoever saves `tensor` for the backward pass keeps nothing: it is made again when the first
    of them needs it, and dropped after the last.

    Nothing of that happens in a checkpointed region, which keeps nothing anyway, while `make` keeps what it refers to.
    """
    if checkpointed or not tensor.requires_grad:
        yield
        return
    storage = tensor.untyped_storage()._cdata
    users, left, made = 0, 0, None

    def pack(saved: Tensor) -> Tensor | torch.Size:
        nonlocal users
        if saved.untyped_storage()._cdata != storage or not saved.is_contiguous():
            return saved
        users += 1
        return saved.shape

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        nonlocal left, made
        if isinstance(kept, Tensor):
            return kept
        if made is None:
            left, made = users, make()
        left, again = left - 1, made.view(kept)
        if not left:
            made = None
        return again

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
