"""Grouped-query attention (arXiv 2305.13245): which form the kernels take, and its bf16 gradient on CPUs.

Axes: B batch, h heads, g key/value heads, S queries, T keys, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from model.ops.bf16_on_cpu import upcasts

ALIGNED = 8  # elements


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys where the mask is True; each group of h/g heads shares keys and values.

    q [B, h, S, d], k and v [B, g, T, d], mask bool [B, 1, S, T] -> [B, S, h * d], heads side by side.
    """
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))  # (B, h, T, d)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B, h, S, T)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)  # (B, S, h * d)


def attention_bias(mask: Tensor, dtype: torch.dtype, heads: int = 1) -> Tensor:
    """What is added to the scores: 0 at keys that a query may look at, -inf elsewhere.

    bool [B, 1, S, T] -> [B, 1, S * heads, T], each query's row `heads` times: for as many heads as are folded into
    queries, see `grouped_attention`. In memory rows have a multiple of ALIGNED elements: of any other bias CUDA's
    kernels make and save a copy in every layer.
    """
    *shape, keys = mask.shape
    aligned = -(-keys // ALIGNED) * ALIGNED
    bias = torch.zeros(*shape, heads, aligned, dtype=dtype, device=mask.device)[..., :keys]  # (B, 1, S, heads, T)
    bias.masked_fill_(~mask[..., None, :], float("-inf"))
    return bias.flatten(2, 3)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`plain_attention` with a bias instead of a mask: [B, 1, S * h/g, T] folds heads, [B, 1, S, T] does not.

    Folded, the heads of a group are more queries of its one key/value head: the least memory, and on CPUs the least
    time (benchmarks/LOG.md). Unfolded, each head sees its group's keys through a view (for g = 1; otherwise a copy).
    On a card that gives the kernels, which share out their work by head and row of the batch, h times as many blocks,
    and the bias has no copy for each head. Known of torch's CUDA kernels, from its sdp_utils.cpp and attention.cpp:
    flash attention takes no bias; memory-efficient attention takes keys expanded over heads without a copy, does not
    group heads by itself, and reads a bias whose rows are aligned as it is, expanded over heads. Assumed: that it is
    faster so, and that the kernel of plain products (math) is never chosen.
    """
    group = q.shape[1] // k.shape[1]
    if bias.shape[2] > q.shape[2]:
        q = q.unflatten(1, (-1, group)).transpose(2, 3)  # (B, g, S, h/g, d)
        attended = attention(q.flatten(2, 3), k, v, bias)  # (B, g, S * h/g, d)
        return attended.unflatten(2, q.shape[2:4]).transpose(1, 2).flatten(2)  # (B, S, h * d)
    k, v = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))  # (B, h, T, d)
    return attention(q, k, v, bias).transpose(1, 2).flatten(2)  # (B, S, h * d)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, [B, h, S, d]; q [B, h, S, d], k, v [B, h, T, d], bias [B, h, S, T], for which
    there is no gradient.
    """
    if not upcasts("attention_grad", q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    output: Tensor = _Attention.apply(q, k, v, bias)
    return output


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
