"""The plan of rows with several answers: what it counts is what such a step takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune import LoRAConfig, inject_lora
from finetune.config.schema import RunConfig
from finetune.preflight.count import TERA, flop_counter
from finetune.preflight.plan import Planner
from finetune.preflight.run_plan import assumed_lengths
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemma, PaliGemmaConfig, TextConfig, VisionConfig
from tests import suffixes
from tests.preflight.test_plan import measured_peak

MIDDLE = PaliGemmaConfig(
    VisionConfig(48, 96, 2, 4, image_size=112), TextConfig(256, 1024, 4, 4, 1, 64, vocab_size=8192), image_token_id=8000
)
LORA = LoRAConfig(rank=4)
ANSWERS = [3, 2, 4, 2, 3, 2, 5, 2, 3, 4]
IMAGES, PROMPT = MIDDLE.num_image_tokens, 12  # tokens, <bos> among the latter


def planned_and_real(rows: int) -> tuple[Planner, PaliGemma, dict[str, torch.Tensor]]:
    """The plan for rows of ten answers, in fp32 on the CPU, the network, and a batch."""
    model = PaliGemma(MIDDLE)
    inject_lora(model, LORA)
    batch = suffixes.together(*suffixes.random_rows(IMAGES, 8000, [PROMPT] * rows, [ANSWERS] * rows))
    tokens, supervised = IMAGES + PROMPT + sum(ANSWERS), sum(ANSWERS)
    planner = Planner(MIDDLE, LORA, torch.float32, tokens, supervised, rows, torch.device("cpu"))
    return planner, model.train(), batch


@pytest.mark.parametrize("layers", [0, 2])
def test_the_planned_peak_is_what_the_allocator_gives(layers: int) -> None:
    """Within 10%, as for one answer."""
    planner, model, batch = planned_and_real(rows=4)
    model.language_model.model.set_recompute(layers)
    features = torch.zeros(4, IMAGES, 256)

    def step() -> None:
        loss = model(**batch, image_features=features).loss
        assert loss is not None
        loss.backward()

    step()  # makes the gradients
    planned = planner.plan(ExecutionPlan(4, recompute_layers=layers), 10**12).components
    names = ("activations", "logits", "buffers of a layer's backward (estimate)")
    assert sum(planned[name] for name in names) == pytest.approx(measured_peak(step), rel=0.1)


def test_planned_flops_are_those_of_a_real_step_and_the_shared_position_in_the_last_layer() -> None:
    """That predicts the first token of each answer: planned as computed for each, it is computed once."""
    planner, model, batch = planned_and_real(rows=1)
    planned = planner.tflop(ExecutionPlan(1), images=0)
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        loss = model(**batch, image_features=torch.zeros(1, IMAGES, 256)).loss
        assert loss is not None
        loss.backward()
    counted = counter.get_total_flops() / TERA
    assert counted < planned < 1.03 * counted


def test_an_evaluation_has_one_answer_a_row() -> None:
    """Its logits are planned for the longest single answer, not for all of a row in training."""
    lengths = (torch.float32, IMAGES + PROMPT + sum(ANSWERS), sum(ANSWERS), 4, torch.device("cpu"))
    for_all, for_one = Planner(MIDDLE, LORA, *lengths), Planner(MIDDLE, LORA, *lengths, answer=max(ANSWERS))
    saved = for_all.evaluation(4, 5) - for_one.evaluation(4, 5)
    logits = (sum(ANSWERS) - max(ANSWERS)) * 8192 * (4 + 8) * 4
    assert saved == pytest.approx(1.1 * logits, rel=1e-6)
    assert for_all.plan(ExecutionPlan(4), 0).total == for_one.plan(ExecutionPlan(4), 0).total


@pytest.mark.parametrize(("answers", "text", "supervised"), [("rotate", 32, 8), ("all", 64, 40)])
def test_rows_of_all_answers_are_taken_to_be_longer_where_the_data_cannot_be_read(
    answers: str, text: int, supervised: int
) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": {"jsonl": "unused.jsonl"}, "answers": answers},
            "train": {"epochs": 1},
            "output": "unused",
        }
    )
    found = assumed_lengths(config)
    assert (found.text, found.supervised, found.answer) == (text, supervised, 8)
