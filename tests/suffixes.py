"""Rows of several suffixes, and the same suffixes in rows of their own: for the tests that both are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data import collate

Example = dict[str, Any]


def row_of(prompt: Tensor, suffixes: Sequence[Tensor], weights: Sequence[float] | None = None) -> Example:
    """The tensors i64 [S] of a prompt and its suffixes, and f32 [S] weights of their tokens."""
    numbers = [number for number, suffix in enumerate(suffixes, start=1) for _ in suffix]
    answers = torch.cat(list(suffixes))
    types = torch.tensor([0] * len(prompt) + numbers)
    row = {
        "input_ids": torch.cat((prompt, answers)),
        "token_type_ids": types,
        "labels": torch.cat((torch.full_like(prompt, -100), answers)),
    }
    return row if weights is None else {**row, "loss_weights": torch.tensor([0.0, *weights])[types]}


def random_rows(
    images: int, image_token_id: int, prompts: Sequence[int], suffixes: Sequence[Sequence[int]], seed: int = 0
) -> tuple[list[Tensor], list[list[Tensor]], list[list[float]]]:
    """Prompts of so many image tokens and text, the suffixes of each by their lengths, and their weights, of which
    those of a row add up to 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> Tensor:
        return torch.randint(3, 120, (count,), generator=generator)

    asked = [torch.cat((torch.full((images,), image_token_id), tokens(length))) for length in prompts]
    answers = [[tokens(length) for length in lengths] for lengths in suffixes]
    drawn = [torch.rand(len(lengths), generator=generator) + 0.1 for lengths in suffixes]
    return asked, answers, [(weights / weights.sum()).tolist() for weights in drawn]


def together(prompts: Sequence[Tensor], suffixes: Sequence[Sequence[Tensor]], weights: Any = None) -> dict[str, Tensor]:
    """A batch of a row for each prompt."""
    weights = weights or [None] * len(prompts)
    return collate([row_of(*row) for row in zip(prompts, suffixes, weights, strict=True)], pad_id=0)


def apart(prompts: Sequence[Tensor], suffixes: Sequence[Sequence[Tensor]]) -> list[dict[str, Tensor]]:
    """The same without its padding: a batch of one row for each suffix, row by row."""
    return [
        collate([row_of(prompt, [suffix])], pad_id=0)
        for prompt, answers in zip(prompts, suffixes, strict=True)
        for suffix in answers
    ]
