"""What depends on rounding, by its relative distance from a result in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.acceptance.findings import Finding, judged

TWICE = 2.0  # how much further from fp64 than the reference ours may be
FLOOR = 2e-6  # a relative distance that is rounding in fp32, whoever computed it
NEAR = 1e-4  # relative, within which a reference in fp32 must be from our fp64: TF32 or a wrong formula is not


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in fp64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def worst(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest distance of a tensor; infinite where one has other names."""
    return max(distance(a[name], b[name]) for name in b) if a.keys() == b.keys() else float("inf")


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """All of them as one vector, in the order of their names."""
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


def beside(
    name: str, mine: float, reference: float, other: str, limit: float = TWICE, floor: float = FLOOR, **details: Any
) -> Finding:
    """Whether our distance from fp64 is within `limit` times another's, or below the floor."""
    bound = f"<= {limit:g} x {other} {reference:.2g}" + (f", or {floor:.0e}" if floor else "")
    passed = mine <= max(limit * reference, floor)
    return judged(name, passed, f"{mine:.2g}", bound, ours=mine, reference=reference, **details)
