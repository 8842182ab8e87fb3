"""The look at a batch before training finds what would ruin it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data import Processor
from finetune.preflight.inspection import leaks_of, problems_of, structure_of
from model import PaliGemma
from model.random_init import from_random

ROOT = Path(__file__).parents[2]
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> PaliGemma:
    return from_random(ROOT / "assets/tiny-base", seed=0)


@pytest.fixture
def batch() -> Batch:
    from PIL import Image

    images = [Image.effect_noise((40, 40), 80).convert("RGB") for _ in range(2)]
    processor = Processor.from_pretrained(ROOT / "assets/tiny-base")
    return processor(images=images, prefixes=["answer en how many?", "caption en"], suffixes=["two", "a red circle"])


def test_a_batch_of_the_processor_is_in_order(model: PaliGemma, batch: Batch) -> None:
    assert problems_of(model, batch) == []


def types_all_prefix(batch: Batch) -> None:
    batch["token_type_ids"].zero_()


def an_image_token_lost(batch: Batch) -> None:
    batch["input_ids"][0, 0] = 9


def a_second_bos(batch: Batch) -> None:
    batch["input_ids"][0, 20] = 2


def no_eos(batch: Batch) -> None:
    last = int(batch["attention_mask"][0].sum()) - 1
    batch["labels"][0, last] = batch["input_ids"][0, last] = 9


def a_prompt_position_labelled(batch: Batch) -> None:
    batch["labels"][0, 17] = batch["input_ids"][0, 17]


def image_tokens_labelled(batch: Batch) -> None:
    batch["labels"][0, :5] = batch["input_ids"][0, :5]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (types_all_prefix, "token types are not 0 for the prefix"),
        (types_all_prefix, "the answer leaks into the prefix"),
        (an_image_token_lost, "15 image tokens, expected 16"),
        (a_second_bos, "2 <bos>"),
        (no_eos, "does not end in <eos>"),
        (a_prompt_position_labelled, "labels are not the suffix"),
        (image_tokens_labelled, "labels are not the suffix"),
    ],
)
def test_what_ruins_training_is_found(
    model: PaliGemma, batch: Batch, spoil: Callable[[Batch], None], message: str
) -> None:
    spoil(batch)
    row = {name: tensor[0] for name, tensor in batch.items()}
    # A row that lacks an image token cannot pass the network at all, so only its structure is looked at.
    found = structure_of(model, row) if spoil is an_image_token_lost else problems_of(model, batch)
    assert any(message in problem for problem in found), found


def test_the_leak_is_found_in_the_row_where_it_is(model: PaliGemma, batch: Batch) -> None:
    batch["token_type_ids"][1] = 0
    assert leaks_of(model, batch) == ["row 1: the answer leaks into the prefix"]
    assert torch.is_grad_enabled()
