"""The arithmetic of an adapted linear: what it computes, and how little it keeps for the backward pass.

Autograd by itself would keep a copy of x in the adapters' dtype, what dropout left of it and A x for each linear; here
x alone is kept, which linears that read the same x share. Dropout is a function of keys, so that it can be drawn again.

Axes: B batch, n rows of x, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from finetune.quantize import dense
from model.products import add_product, grad_of_input, grad_of_weight, product


class LowRank(Function):
    """(x, A, B, b, ...) -> (x [n, in] to be multiplied by the frozen weight, b + scale * B A dropout(x) [n, out]).

    Keeps x, which linears that read the same x share, and neither a copy of it in another dtype, nor what dropout left
    of it, nor A x. Passing x through lets the two parts of its gradient end up in one buffer. Products are taken in the
    dtype of x; as the low-rank ones come first, a checkpointed region ends before the frozen one is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float, rows: Tensor | None, p: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a, b, rows)
        ctx.scale, ctx.p = scale, p
        through = x.flatten(0, -2)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(through)
        low = product(dropped(x, rows, p).flatten(0, -2), a.to(x.dtype)) * scale
        return through, product(low, b.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, rows = ctx.saved_tensors
        left = dropped(x, rows, ctx.p).flatten(0, -2)
        low = product(left, a.to(x.dtype)) * ctx.scale  # [n, r]
        grad_low = grad_of_input(grad, b.to(x.dtype)) * ctx.scale  # [n, r]
        grad_a, grad_b = grad_of_weight(grad_low, left).to(a.dtype), grad_of_weight(grad, low).to(b.dtype)
        total = None
        if ctx.needs_input_grad[0] and rows is None:
            total = grad_of_input(grad_low, a.to(x.dtype), onto=grad_x).view_as(x)
        elif ctx.needs_input_grad[0]:
            total = grad_x.view_as(x) + dropped(grad_of_input(grad_low, a.to(x.dtype)).view_as(x), rows, ctx.p)
        return total, grad_a, grad_b, None, None, None, None


class FrozenProduct(Function):
    """update [n, out] += x [n, in] W^T, in place, of a frozen linear; an NF4 one is made dense for each pass anew."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
        ctx.linear = linear
        ctx.mark_dirty(update)
        return add_product(update, x, dense(linear))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, grad_of_input(grad, dense(ctx.linear)) if ctx.needs_input_grad[1] else None, None


def dropped(x: Tensor, rows: Tensor | None, p: float) -> Tensor:
    """Dropout of x [B, ...] with probability p, a function of each row's key i64 [B]; x itself without keys."""
    if rows is None:
        return x
    cells = mix(torch.arange(x[0].numel(), device=x.device)).view_as(x[0])
    keep = torch.stack([mix(cells ^ row) >= int(p * 2**32) for row in mix(rows)])
    return x * keep / (1 - p)


def mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (lowbias32), on i64 tensors: a random number for each key, wherever it is computed."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
