"""The gated activation gelu(gate) * up (arXiv 2002.05202), which saves its two inputs for the backward pass.

Plain autograd saves gelu(gate) too.

Axes: F intermediate; leading axes are free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from model.ops.recompute import cheap_to_recompute


def plain_geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, gelu in its tanh form; [..., F]."""
    return gelu(gate, approximate="tanh") * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """`plain_geglu` in less memory; its output is cheap to recompute."""
    output: Tensor = _GeGLU.apply(gate, up)
    return cheap_to_recompute(output, _GeGLU.apply, gate, up)


class _GeGLU(Function):
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
