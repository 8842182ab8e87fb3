"""Plans of runs without counting the same network twice, which takes as long as a small run's training.

What a run may take, where that comes from, its micro-batches and its questions at once are planned anew for each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from finetune.lora.linear import LoRAConfig
from finetune.preflight import run_plan
from finetune.preflight.plan import Planner
from model import PaliGemmaConfig

COUNTED: dict[str, Planner] = {}


@contextmanager
def remembered_plans() -> Iterator[None]:
    """The planner of a run takes its counts from one before it of equal dimensions, adapters, dtype and lengths."""
    with mock.patch.object(run_plan, "Planner", planner):
        yield


def planner(
    config: PaliGemmaConfig,
    lora: LoRAConfig | None,
    dtype: torch.dtype,
    tokens: int,
    supervised: int,
    batch_size: int,
    device: torch.device,
    quantize: str | None,
    answer: int,
) -> Planner:
    """`Planner` of these arguments; neither of the two that are set here is part of what it counts."""
    key = repr((config, lora, dtype, tokens, supervised, device, quantize))
    if key not in COUNTED:
        COUNTED[key] = Planner(config, lora, dtype, tokens, supervised, batch_size, device, quantize, answer)
    made = copy.copy(COUNTED[key])
    made.batch_size, made.answer = batch_size, answer
    made.sizes = dict(made.sizes)  # `shard_decoder` changes them
    return made
