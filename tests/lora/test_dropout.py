"""Dropout drawn from seeds: the same whatever the batch, even and independent, in a handful of kernels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from finetune import LoRALinear
from finetune.lora.dropout import Dropout, feature_keys, seed_of
from finetune.lora.protocol import AdapterSettings, set_dropout_seeds
from tests import rounding
from tests.model.test_memory import Executed

VIEWS = {
    "aten::view",
    "aten::unsqueeze",
    "aten::slice",
    "aten::select",
    "aten::t",
    "aten::_unsafe_view",
    "aten::detach",
}


@pytest.fixture
def dropping() -> LoRALinear:
    adapter = LoRALinear(nn.Linear(64, 8), AdapterSettings(4, 4, dropout=0.25), key=11, seed=0)
    nn.init.normal_(adapter.lora_B)
    return adapter.train()


def test_dropout_of_a_row_does_not_depend_on_its_batch(dropping: LoRALinear) -> None:
    x = torch.randn(3, 10, 64, dtype=torch.float64)
    rounding.in_dtype(dropping, torch.float64)
    seeds = torch.tensor([5, 9, 2], dtype=torch.int32)
    set_dropout_seeds(dropping, seeds)
    together = dropping(x)
    for i in range(3):
        set_dropout_seeds(dropping, seeds[i : i + 1])
        padded = torch.cat((x[i : i + 1], x.new_zeros(1, 4, 64)), dim=1)
        rounding.assert_exact(dropping(padded)[0, :10], together[i])
    with pytest.raises(ValueError, match="1 dropout seeds were set for a batch of 3"):
        dropping(x)


def test_dropout_without_seeds_differs_at_each_call_and_follows_the_seed(dropping: LoRALinear) -> None:
    x = torch.randn(3, 10, 64)
    torch.manual_seed(0)
    first, second = dropping(x), dropping(x)
    torch.manual_seed(0)
    assert torch.equal(dropping(x), first)
    assert not torch.equal(first, second)


def test_dropout_differs_between_modules_and_rows_and_is_off_in_evaluation(dropping: LoRALinear) -> None:
    settings = AdapterSettings(4, 4, dropout=0.25)
    same, other = (LoRALinear(nn.Linear(64, 8), settings, key=key, seed=0).train() for key in (11, 12))
    x = torch.ones(2, 10, 64)
    for adapter in (same, other):
        adapter.load_state_dict(dropping.state_dict())
    for adapter in (dropping, same, other):
        set_dropout_seeds(adapter, torch.tensor([1, 2], dtype=torch.int32))
    assert torch.equal(dropping(x), same(x))
    assert not torch.equal(dropping(x), other(x))
    first, second = dropping(x)
    assert not torch.equal(first, second)
    plain = dropping.eval()(x)
    set_dropout_seeds(dropping, None)
    assert torch.equal(dropping(x), plain)


SEEDS = {
    "records": torch.tensor([seed_of(0, 7, record) for record in range(32)]),
    "steps": torch.tensor([seed_of(0, step, "a") for step in range(32)]),
}


def masks(p: float, seeds: Tensor, positions: int = 33, features: int = 2048, key: int = 7) -> Tensor:
    """fp64 [B * S, F], 1 where an element is dropped."""
    drawn = Dropout(p, seeds, feature_keys(key, features)).mask(torch.empty(len(seeds), positions, features))
    return drawn.flatten(0, 1).double()


def correlations(variables: Tensor) -> Tensor:
    """Of all pairs of rows, in units of their standard deviation where rows are independent."""
    found = torch.corrcoef(variables) * math.sqrt(variables.shape[1])
    return found[tuple(torch.triu_indices(len(found), len(found), offset=1))]


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("key", [7, 3_000_000_000])
@pytest.mark.parametrize("seeds", SEEDS.values(), ids=SEEDS)
def test_masks_have_their_mean_and_are_independent(p: float, key: int, seeds: Tensor) -> None:
    """Of rows and positions, of features, and of modules. Of the half or two million
    pairs, the largest correlation of independent masks is about five standard deviations; those of rare drops have a
    longer tail.
    """
    drawn, other = (masks(p, seeds.int(), key=key) for key in (key, key + 1))
    deviation = math.sqrt(p * (1 - p))
    for found in (drawn, other):
        assert abs(found.mean().item() - p) < 4 * deviation / math.sqrt(found.numel())
        for variables in (found, found.t()):
            shares = (variables.mean(1) - p) / deviation * math.sqrt(variables.shape[1])
            assert shares.std().item() == pytest.approx(1, abs=0.1)
            assert shares.abs().max() < 6
            pairs = correlations(variables)
            assert pairs.std().item() == pytest.approx(1, abs=0.02)
            assert pairs.abs().max() < (7 if p == 0.5 else 9)
    for dim in (0, 1):
        between = ((drawn - p) * (other - p)).mean(dim) / deviation**2 * math.sqrt(drawn.shape[dim])
        assert between.std().item() == pytest.approx(1, abs=0.1)
        assert between.abs().max() < 7


def test_features_have_keys_of_their_own() -> None:
    keys = torch.cat([feature_keys(key, 16384) for key in (0, 1, 2**32 - 1)], dim=1)
    assert len(keys.t().unique(dim=0)) == 3 * 16384
    counts = torch.histc(keys.double(), bins=64, min=-(2**31), max=2**31)
    assert (counts / counts.mean() - 1).abs().max() < 0.2


@pytest.mark.parametrize("rows", [1, 16])
def test_dropout_adds_ten_kernels_to_a_linear_whatever_its_rows(dropping: LoRALinear, rows: int) -> None:
    """And twelve to its backward pass, where the mask is used twice and one product is not fused with a sum."""
    x, grad = torch.randn(rows, 10, 64).requires_grad_(), torch.randn(rows, 10, 8)
    set_dropout_seeds(dropping, torch.arange(rows, dtype=torch.int32))

    def kernels() -> list[int]:
        with Executed() as forward:
            output = dropping(x)
        with Executed() as backward:
            torch.autograd.grad(output, [x, dropping.lora_A, dropping.lora_B], grad)
        return [sum(name not in VIEWS for name in ran.names) for ran in (forward, backward)]

    with_dropout = kernels()
    dropping.eval()
    without = kernels()
    assert [some - fewer for some, fewer in zip(with_dropout, without, strict=True)] == [10, 12]
