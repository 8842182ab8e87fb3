"""Rows of text alone, in batches without images: against transformers, and against rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration

from model import PaliGemma, prefix_lm_mask
from model.checkpoint import canonical_name
from tests import rounding, tiny
from tests.rounding import computed_by

IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PaliGemmaForConditionalGeneration, PaliGemma]:
    library = tiny.library_model(tiny.CONFIG)
    directory: Path = tiny.save_library_model(library, tmp_path_factory.mktemp("tiny"))
    return library, PaliGemma.from_pretrained(directory, dtype=torch.float32)


def text_batch(prompts: list[int], suffixes: list[int] | None = None) -> dict[str, Tensor]:
    """Rows as tiny.batch makes them, without images and their tokens."""
    made = tiny.batch(tiny.CONFIG, prompts, suffixes)
    return {name: tensor[:, IMAGE_TOKENS:] for name, tensor in made.items() if name != "pixel_values"}


def library_logits(library: PaliGemmaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Of transformers' Gemma alone, given the mask of the prefix-LM and PaliGemma's positions, from 1 on."""
    positions = torch.arange(1, batch["input_ids"].shape[1] + 1).expand_as(batch["input_ids"])
    hidden = library.model.language_model(
        input_ids=batch["input_ids"],
        attention_mask=prefix_lm_mask(batch["attention_mask"], batch["token_type_ids"]),
        position_ids=positions,
    ).last_hidden_state
    logits: Tensor = library.lm_head(hidden)
    return logits


@pytest.mark.parametrize("prompts", [[7], [5, 9, 3], [1, 1]])
@pytest.mark.parametrize("with_suffix", [False, True])
def test_logits_are_those_of_the_librarys_language_model(pair: Any, prompts: list[int], with_suffix: bool) -> None:
    batch = text_batch(prompts, [2, 4, 1][: len(prompts)] if with_suffix else None)
    real, given = batch["attention_mask"].bool(), {name: t for name, t in batch.items() if name != "labels"}
    library, ours = pair
    with torch.no_grad():
        rounding.assert_same(
            computed_by(ours, lambda model: model(**given).logits[real]),
            computed_by(library, lambda model: library_logits(model, batch)[real]),
        )


def test_loss_and_gradients_are_the_librarys(pair: Any) -> None:
    """Its whole network, which makes the mask itself: nothing before the decoder has a gradient in either."""
    library, ours = pair
    batch = text_batch([5, 9, 3], [2, 4, 1])

    def learned(model: Any) -> dict[str, Tensor]:
        loss = model(**batch).loss
        loss.backward()
        network = model if isinstance(model, PaliGemma) else model.model
        found = {str(canonical_name(name)): p.grad for name, p in network.named_parameters() if p.grad is not None}
        assert not [name for name in found if "language_model" not in name]
        return {"loss": loss.detach(), **found}

    rounding.assert_same(computed_by(ours, learned), computed_by(library, learned))


def test_a_batch_answers_and_scores_as_its_rows_do_alone(pair: Any) -> None:
    _, ours = pair
    batch = text_batch([5, 9, 3])
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = [{name: row[name] for name in given} for row in tiny.rows_of(batch)]
    together = ours.generate(**given, max_new_tokens=6)
    for row, alone in enumerate(rows):
        answer = ours.generate(**alone, max_new_tokens=6)[0]
        assert torch.equal(together[row, : len(answer)], answer)


def test_candidates_behind_text_are_as_likely_as_each_in_a_row_of_its_own(pair: Any) -> None:
    batch = text_batch([5, 9, 3])
    candidates = [[[7, 8, 1], [9, 1]], [[5, 1]], [[3, 1], [4, 4, 4, 1], [6, 1]]]

    def together(model: PaliGemma) -> dict[str, Tensor]:
        found = model.score(batch["input_ids"], candidates, attention_mask=batch["attention_mask"]).log_probs
        return {str(row): scores for row, scores in enumerate(found)}

    def alone(model: PaliGemma) -> dict[str, Tensor]:
        found = {}
        for row, one in enumerate(tiny.rows_of(batch)):
            prompt, scores = one["input_ids"], []
            for answer in candidates[row]:
                ids = torch.cat((prompt, torch.tensor([answer])), dim=1)
                is_answer = torch.arange(ids.shape[1])[None] >= prompt.shape[1]
                output = model(ids, token_type_ids=is_answer.long(), labels=ids.where(is_answer, -100))
                scores.append(-len(answer) * output.loss.detach())
            found[str(row)] = torch.stack(scores)
        return found

    rounding.assert_same(computed_by(pair[1], together), computed_by(pair[1], alone))


def test_rows_of_both_kinds_in_one_batch_are_refused(pair: Any) -> None:
    with_image, text = tiny.batch(tiny.CONFIG, [5]), text_batch([9])
    ids = torch.cat((with_image["input_ids"], text["input_ids"]))
    with pytest.raises(ValueError, match=r"the 2 rows hold \[4, 0\] image tokens; expected as many in each"):
        pair[1](ids, with_image["pixel_values"])
