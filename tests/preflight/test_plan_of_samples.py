"""The plan of runs that draw answers before each step: what it counts is what drawing them takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune import LoRAConfig
from finetune.preflight.plan import Planner
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from tests import tiny
from tests.preflight.test_plan import measured_peak

MIDDLE = PaliGemmaConfig(
    VisionConfig(48, 96, 2, 4, image_size=112), TextConfig(256, 1024, 4, 4, 1, 64, vocab_size=8192), image_token_id=8000
)
DRAWING = "drawing answers above that (estimate)"


def planner_of(samples: int, prompt: int, new_tokens: int) -> Planner:
    """For prompts of so many tokens, their images included, and so many answers to each."""
    supervised = samples * new_tokens
    lengths = (prompt + supervised, supervised, 4)
    planner = Planner(MIDDLE, LoRAConfig(rank=4), torch.float32, *lengths, torch.device("cpu"))
    planner.samples = samples
    return planner


@pytest.mark.parametrize(("prompts", "samples", "text", "new_tokens"), [(4, 4, 200, 4), (2, 32, 12, 6), (1, 8, 60, 40)])
def test_planned_is_what_drawing_takes(prompts: int, samples: int, text: int, new_tokens: int) -> None:
    """Within 15%, where the prefill, the logits, or the cache is most of it."""
    model = PaliGemma(MIDDLE).eval()
    batch: dict[str, Any] = tiny.batch(MIDDLE.to_hf(torch.float32), [text] * prompts)
    features = model.encode_images(batch.pop("pixel_values")).detach()
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": 1.0, "samples": samples}

    def draw() -> None:
        model.generate_scored(**batch, image_features=features, **settings)

    planned = planner_of(samples, batch["input_ids"].shape[1], new_tokens).sampling(prompts)
    assert measured_peak(draw) == pytest.approx(planned, rel=0.15)


def test_the_larger_of_step_and_drawing_is_planned() -> None:
    """Short answers drawn many times take more than a step of few of them; and a run that draws none takes nothing."""
    planner, execution = planner_of(4, 100, 2), ExecutionPlan(2, recompute_layers=4)
    step = planner.activation_components(execution)
    assert step.pop(DRAWING) == 0
    planner.samples, planner.supervised = 400, 8
    components = planner.activation_components(execution)
    assert components[DRAWING] == planner.sampling(2) - sum(step.values()) > 0
    planner.samples = 0
    assert DRAWING not in planner.activation_components(execution)
