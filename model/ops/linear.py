"""Linear layers and convolutions whose bf16 products a slow CPU takes in fp32 (`bf16_on_cpu` says when).

The weight is cast a chunk at a time, so that no fp32 copy of it is needed.

Axes: n rows (all leading axes together), in/out features of a weight [out, in].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.ops.bf16_on_cpu import upcasts

CHUNK = 2**22  # elements cast at a time


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] W^T + b, [..., out]."""
    return x @ weight.t() if bias is None else x @ weight.t() + bias


def chunk_rows(weight: Tensor) -> int:
    """Rows of a weight [out, in] that are cast at a time."""
    return min(len(weight), max(1, CHUNK // weight.shape[1]))


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in] W^T + b, [n, out], without autograd."""
    if not upcasts("forward", x, weight):
        return F.linear(x, weight, bias)
    return add_linear(x.new_zeros(len(x), len(weight)) if bias is None else bias.repeat(len(x), 1), x, weight)


def add_linear(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """out [n, out] += x [n, in] W^T, in place."""
    if not upcasts("forward", x, weight):
        return out.addmm_(x, weight.t())
    x, size = x.float(), chunk_rows(weight)
    cast, summed = torch.empty(size, weight.shape[1]), torch.empty(len(x), size)
    for columns, chunk in zip(out.split(size, dim=1), weight.split(size), strict=True):
        total = summed[:, : len(chunk)].copy_(columns)
        columns.copy_(total.addmm_(x, cast[: len(chunk)].copy_(chunk).t()))
    return out


def grad_input(grad: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """The gradient of x W^T for x: grad [n, out] W, [n, in]; added to `onto` [n, in] if there is one."""
    if not upcasts("input_grad", grad, weight):
        return grad @ weight if onto is None else onto.addmm(grad, weight)
    total = torch.zeros(len(grad), weight.shape[1]) if onto is None else onto.float()
    size = chunk_rows(weight)
    cast = torch.empty(size, weight.shape[1])
    for columns, chunk in zip(grad.split(size, dim=1), weight.split(size), strict=True):
        total.addmm_(columns.float(), cast[: len(chunk)].copy_(chunk))
    return total.to(grad.dtype)


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
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
        return linear_forward(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), flat = ctx.saved_tensors, grad.flatten(0, -2)
        grad_x = None if weight is None else grad_input(flat, weight).view(*grad.shape[:-1], -1)
        grad_w = None if x is None else grad_weight(flat, x.flatten(0, -2))
        return grad_x, grad_w, flat.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`plain_linear`, with gradients for all three."""
    if not any(upcasts(direction, x.flatten(0, -2), weight) for direction in ("forward", "input_grad", "weight_grad")):
        return F.linear(x, weight, bias)
    output: Tensor = _Linear.apply(x, weight, bias)
    return output


class Linear(nn.Linear):
    """`nn.Linear`, whose bf16 products a slow CPU takes in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, which a slow CPU takes in fp32 for bf16."""

    def forward(self, x: Tensor) -> Tensor:
        if not upcasts("convolution", x, self.weight):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
