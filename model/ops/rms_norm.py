"""RMSNorm that saves its input and one number a row for the backward pass.

Plain autograd saves fp32 copies of both factors of each product. Values and gradients are the same; arithmetic is in
fp32 (fp64 for fp64 inputs), rounded once.

Axes: D hidden; leading axes are free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.ops.recompute import cheap_to_recompute


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight) over the last axis (arXiv 1910.07467; the 1 + is Gemma's); [..., D], x's dtype."""
    normed = upcast(x) * torch.rsqrt(upcast(x).pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + upcast(weight))).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`plain_rms_norm` in less memory; its output is cheap to recompute."""
    output: Tensor = _RMSNorm.apply(x, weight, eps)
    return cheap_to_recompute(output, _RMSNorm.apply, x, weight, eps)


def upcast(x: Tensor) -> Tensor:
    """x in fp32; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse_rms = torch.rsqrt(upcast(x).pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (upcast(x) * inverse_rms * (1.0 + upcast(weight))).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed, grad_x, grad_weight = upcast(x) * inverse_rms, None, None
        if ctx.needs_input_grad[1]:
            grad_weight = (upcast(grad) * normed).flatten(0, -2).sum(0).to(weight.dtype)  # (D,)
        if ctx.needs_input_grad[0]:
            grad_normed = upcast(grad) * (1.0 + upcast(weight))
            mean = (grad_normed * normed).mean(-1, keepdim=True)  # (..., 1)
            grad_x = (inverse_rms * (grad_normed - normed * mean)).to(x.dtype)
        return grad_x, grad_weight, None
