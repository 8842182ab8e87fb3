"""Each op of `model/ops` against the plain formula beside it, and what is recomputed instead of saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from model.ops.attention import attention_bias, grouped_attention, plain_attention
from model.ops.linear import linear, plain_linear
from model.ops.recompute import cheap_to_recompute, recompute_cheap_outputs, recompute_layer
from tests import rounding


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("folded", [True, False])
def test_grouped_attention_is_the_plain_formula_in_fp64(key_heads: int, folded: bool) -> None:
    q, k, v = double(2, 4, 5, 8), double(2, key_heads, 7, 8), double(2, key_heads, 7, 8)
    mask = torch.rand(2, 1, 5, 7) < 0.5
    mask[..., 0] = True
    bias = attention_bias(mask, torch.float64, 4 // key_heads if folded else 1)
    ours, plain = grouped_attention(q, k, v, bias), plain_attention(q, k, v, mask)
    assert ours.shape == (2, 5, 4 * 8)
    grad = torch.randn_like(plain)
    gradients = [torch.autograd.grad(output, (q, k, v), grad) for output in (ours, plain)]
    rounding.assert_exact([ours, *gradients[0]], [plain, *gradients[1]])


@pytest.mark.parametrize("bias", [None, double(5)])
def test_linear_is_the_plain_formula_in_fp64(bias: Tensor | None) -> None:
    x, weight = double(2, 3, 6), double(5, 6)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    ours, plain = linear(*inputs), plain_linear(*inputs)
    gradients = [torch.autograd.grad(output.pow(2).sum(), inputs) for output in (ours, plain)]
    rounding.assert_exact([ours, *gradients[0]], [plain, *gradients[1]])


def test_what_is_not_recomputed_goes_to_the_hooks_outside() -> None:
    """Of x, weight, 2 x and a slice of it, 2 x is not saved; the slice is another tensor, in the same storage."""
    x, weight = double(4, 4), double(4, 4)
    packed: list[Tensor] = []
    unpacked: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    def unpack(index: int) -> Tensor:
        unpacked.append(packed[index])
        return packed[index]

    def run() -> Tensor:
        doubled = cheap_to_recompute(x * 2, lambda x: x * 2, x)
        return (doubled @ weight).sum() + (doubled[:2] @ weight).sum()

    gradients = torch.autograd.grad(run(), [x, weight])
    with saved_tensors_hooks(pack, unpack), recompute_cheap_outputs():
        loss = run()
    assert [tuple(tensor.shape) for tensor in packed] == [(4, 4), (4, 4), (2, 4)]
    for saved, expected in zip(packed, (weight, weight, x[:2] * 2), strict=True):
        assert torch.equal(saved, expected)
    rounding.assert_exact(list(torch.autograd.grad(loss, [x, weight])), list(gradients))
    assert len(unpacked) == 3


def test_a_layer_that_is_recomputed_whole_holds_nothing_for_its_cheap_outputs() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            halved = x / 2
            held.append(StorageWeakRef(halved.untyped_storage()))
            outputs.append(cheap_to_recompute(halved * 4, lambda halved: halved * 4, halved))
            return outputs[-1] * 1

    held: list[StorageWeakRef] = []
    outputs: list[Tensor] = []
    with recompute_cheap_outputs():
        plain = Doubled()(double(3))
        recomputed = recompute_layer(Doubled(), double(3))
        assert [storage.expired() for storage in held] == [False, True]
    assert [storage.expired() for storage in held] == [True, True]
    (plain.sum() + recomputed.sum()).backward()
