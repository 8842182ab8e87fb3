"""Operations that keep for the backward pass only what it cannot cheaply compute again.

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
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu


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
