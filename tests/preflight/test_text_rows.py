"""Rows of text alone before training: what is planned, counted and looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from data import PaliGemmaDataset, Processor, collate
from data.records import load_records
from finetune.lora.config import LoRAConfig
from finetune.preflight.data_checks import duplicate_checks
from finetune.preflight.dry_run import tflop_of_example
from finetune.preflight.inspection import batch_checks, leaks_by_mask, leaks_of, structure_of, without_pixels
from finetune.preflight.plan import Plan, Planner
from finetune.preflight.probe import StepWorkload, images_per_step
from finetune.training.batch_sampler import BatchSampler
from finetune.training.examples import shared_images_note
from finetune.training.execution_plan import ExecutionPlan
from model import PaliGemma, PaliGemmaConfig
from model.random_init import from_random
from tests.images import IMAGE

BASE = Path(__file__).parents[2] / "assets/tiny-base"
PHOTO = {"image": "a.jpg", "prefix": "caption en", "suffix": "a logo"}
TEXT = {"prefix": "answer en 2 and 2", "suffix": "4"}


def records(folder: Path, *lines: dict[str, Any]) -> Dataset:
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(IMAGE)
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load_records(jsonl=folder / "lines.jsonl", text_rows=True, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    return from_random(BASE, seed=0)


def test_both_kinds_of_rows_are_in_order_and_a_lost_image_token_is_found(model: PaliGemma, tmp_path: Path) -> None:
    processor = Processor.from_pretrained(BASE)
    dataset = PaliGemmaDataset(records(tmp_path, PHOTO, TEXT), processor)
    photo, text = dataset[0], dataset[1]
    batch = collate([without_pixels(photo), without_pixels(text)], processor.pad_id)
    checks = batch_checks(model.config, batch, [], "by a test", with_images=1)
    assert {check.outcome for check in checks} == {"pass"}
    of_text = {name: tensor[1] for name, tensor in batch.items()}
    assert list(structure_of(model.config, of_text, has_image=True)) == ["image tokens", "<bos>"]
    of_photo = {name: tensor[0] for name, tensor in batch.items()}
    assert "expected 0 at the start" in structure_of(model.config, of_photo, has_image=False)["image tokens"]


def test_a_leak_of_a_row_of_text_is_found(model: PaliGemma, tmp_path: Path) -> None:
    processor = Processor.from_pretrained(BASE)
    batch = collate([PaliGemmaDataset(records(tmp_path, TEXT), processor)[0]], processor.pad_id)
    assert leaks_of(model, batch) == leaks_by_mask(batch) == []
    batch["token_type_ids"].zero_()
    assert leaks_of(model, batch) == leaks_by_mask(batch) == [0]


def test_an_image_that_is_none_is_in_no_count(tmp_path: Path) -> None:
    """Rows of train and validation have the same ids, which say nothing; the same text in both is said."""
    train = records(tmp_path / "train", PHOTO, TEXT, TEXT | {"prefix": "another"})
    validation = records(tmp_path / "validation", PHOTO | {"prefix": "detect a"}, TEXT, TEXT | {"prefix": "a third"})
    assert train["image_id"][1:] == validation["image_id"][1:]
    assert shared_images_note(train, validation.select([1, 2])) is None
    assert images_per_step(BatchSampler((3,), 3, 0, 4), train["image_id"]) == 1
    assert images_per_step(BatchSampler((2,), 2, 0, 4), train["image_id"][1:]) == 0
    twice, across = duplicate_checks(train, validation)
    assert twice.outcome == "pass"
    assert across.found.startswith("1 of 3 validation questions are in data.train too")
    assert across.found.endswith(": 2")


def test_the_flops_of_an_example_are_the_mean_over_both_kinds() -> None:
    config = PaliGemmaConfig.from_directory(BASE)
    tokens, images = config.num_image_tokens + 20, config.num_image_tokens
    lora = LoRAConfig(rank=2, targets=("language.*",))
    planner = Planner(config, lora, torch.float32, tokens, 4, 8, torch.device("cpu"))
    plan = Plan(ExecutionPlan(4), {}, 0)
    whole = planner.tflop_of_length(plan.execution, tokens, 4, 1.0)
    text = planner.tflop_of_length(plan.execution, tokens - images, 4, 0.0)
    # Of eight examples six are of text, and two of an image each.
    mixed = tflop_of_example(planner, plan, StepWorkload(8, 2.0, tokens, 4, 0.75))
    assert mixed == pytest.approx((2 * whole + 6 * text) / 8)
    assert tflop_of_example(planner, plan, StepWorkload(8, 8.0, tokens, 4)) == whole > 2 * text
