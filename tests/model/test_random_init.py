"""Training from scratch: the weights it starts with."""

from __future__ import annotations

from pathlib import Path

import torch

from model.random_init import from_random
from tests import tiny

CONNECTOR = "multi_modal_projector.linear.weight"


def test_random_weights_are_seeded_and_start_near_a_uniform_guess(tmp_path: Path) -> None:
    tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path)
    first, again, other = (from_random(tmp_path, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.get_parameter(CONNECTOR), other.get_parameter(CONNECTOR))
    assert all(parameter.isfinite().all() for parameter in first.parameters())
    loss = first(**tiny.batch(tiny.CONFIG, [5, 9], [2, 4])).loss
    assert abs(loss - torch.tensor(128.0).log()) < 1.5
