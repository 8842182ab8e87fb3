"""The adapted linear (arXiv 2106.09685): its formula, and the same with no more than its input saved for backward.

Plain autograd saves x, a copy of x in the adapters' dtype, its elements after dropout, and A x for each linear;
`memory_efficient_lora_linear` saves x alone, which linears with the same input share. It computes the low-rank products
first: nothing is saved behind them, so a recomputed layer stops before the frozen product, which is not computed again.

Axes: n rows of x (all leading axes together), in/out features, r rank.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from finetune.lora.dropout import Dropout
from finetune.lora.nf4 import PackedWeight, dense
from model.ops.linear import add_linear, grad_input, grad_weight, linear_forward


def plain_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """W x + bias + scale * B(A(dropout(x))), [..., out]."""
    dropped = x if dropout is None else x.masked_fill(dropout.mask(x), 0) / (1 - dropout.p)
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(dropped, a), b)


def memory_efficient_lora_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """`plain_lora_linear` that saves x alone for backward; [..., out] in the dtype of x.

    Args:
        x: [..., in]. weight: [out, in], frozen; in NF4 it is unpacked for each product.
        a, b: [r, in], [out, r]; trained, cast to the dtype of x.
    """
    flat, update = LowRank.apply(x, a, b, bias, scale, dropout)  # (n, in), (n, out)
    output: Tensor = FrozenProduct.apply(update, flat, weight)  # (n, out)
    return output.view(*x.shape[:-1], -1)


class LowRank(Function):
    """(x, A, B, bias, ...) -> (x [n, in] for the frozen product, bias + scale * B A dropout(x) [n, out]).

    Passing x through lets both terms of its gradient end up in one buffer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, dropout: Dropout | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a, b)
        # Dropout divides by 1 - p: in the scale, where it costs nothing.
        ctx.scale, ctx.dropout = scale if dropout is None else scale / (1 - dropout.p), dropout
        flat = x.flatten(0, -2)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(flat)
        dropped = flat if dropout is None else x.masked_fill(dropout.mask(x), 0).flatten(0, -2)  # (n, in)
        low = linear_forward(dropped, a.to(x.dtype)) * ctx.scale  # (n, r)
        return flat, linear_forward(low, b.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        mask = None if ctx.dropout is None else ctx.dropout.mask(x)
        dropped = (x if mask is None else x.masked_fill(mask, 0)).flatten(0, -2)  # (n, in)
        low = linear_forward(dropped, a.to(x.dtype)) * ctx.scale  # (n, r)
        grad_low = grad_input(grad, b.to(x.dtype)) * ctx.scale  # (n, r)
        grad_a, grad_b = grad_weight(grad_low, dropped).to(a.dtype), grad_weight(grad, low).to(b.dtype)
        total = None
        if ctx.needs_input_grad[0]:
            if mask is None:
                total = grad_input(grad_low, a.to(x.dtype), onto=grad_x).view_as(x)
            else:
                total = grad_input(grad_low, a.to(x.dtype)).view_as(x).masked_fill_(mask, 0).add_(grad_x.view_as(x))
        return total, grad_a, grad_b, None, None, None


class FrozenProduct(Function):
    """update [n, out] += x [n, in] W^T, in place. Nothing is saved: W is a parameter."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        ctx.mark_dirty(update)
        add_linear(update, x, dense(weight, x.dtype))
        return update  # the very tensor that was marked: torch.compile knows no other as the one changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_input(grad, dense(ctx.weight, ctx.dtype)) if ctx.needs_input_grad[1] else None
        return grad, grad_x, None
