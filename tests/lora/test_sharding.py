"""What is adapted can be sharded: torch's fully_shard finds every weight, and nothing stays whole beside the shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests import fully_sharded, preloaded
from tests.free_port import free_port


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_hold_half_of_every_layer_and_compute_the_same(tmp_path: Path) -> None:
    environment = os.environ | {"MASTER_PORT": str(free_port())}
    done = preloaded.run(fully_sharded.main, str(tmp_path / "found.json"), environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 2 * 2  # processes, in fp64 and in bf16
    for process in found:
        assert process["sharded"]
        assert process["whole"] == 0  # weights that something still holds
        assert process["share"] == pytest.approx(0.5, abs=0.02)
        assert process["loss"] < 1e-12
        assert process["gradients"]
        assert process["trained"] == 2 * 21 + 1
