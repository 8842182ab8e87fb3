"""Operations that keep for the backward pass only what it cannot cheaply compute again.

Each replaces plain autograd where that keeps more: an RMSNorm its input and one number a row instead of fp32 copies of
both factors, a gated activation its two inputs instead of those and what lies between. Values and gradients are the
same; arithmetic is in fp32 (fp64 for fp64 inputs), rounded once.

Axes: D hidden, F intermediate; leading axes are free.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu


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


def remade(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """Within this context whoever saves `tensor` for the backward pass keeps nothing: it is made again when needed.

    Of no use inside a checkpointed region, which keeps nothing anyway, while `make` keeps what it refers to.
    """
    storage = tensor.untyped_storage()._cdata

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage()._cdata == storage else saved

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else make().view(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
