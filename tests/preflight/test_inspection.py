"""The look at a batch before training finds what would ruin it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data import Processor
from finetune.preflight.inspection import batch_checks, leaking_rows, leaks_by_mask, leaks_of, structure_of
from finetune.training.examples import network_config
from model import PaliGemma
from model.random_init import from_random
from tests.preflight.small_run import run_config

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
    assert leaks_of(model, batch) == leaks_by_mask(batch) == []
    checks = batch_checks(model.config, batch, [], "by a test")
    assert [check.name for check in checks] == ["image tokens", "<bos>", "token types", "labels", "<eos>", "leak"]
    assert {check.outcome for check in checks} == {"pass"}


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
        (types_all_prefix, "token types that are not 0 for the prefix"),
        (an_image_token_lost, "15 image tokens, expected 16"),
        (a_second_bos, "2 <bos>"),
        (no_eos, "an answer that does not end in <eos>"),
        (a_prompt_position_labelled, "labels that are not the suffix"),
        (image_tokens_labelled, "labels that are not the suffix"),
    ],
)
def test_what_ruins_training_is_found(
    model: PaliGemma, batch: Batch, spoil: Callable[[Batch], None], message: str
) -> None:
    assert structure_of(model.config, {name: tensor[0] for name, tensor in batch.items()}) == {}
    spoil(batch)
    failed = [check for check in batch_checks(model.config, batch, [], "") if check.outcome == "fail"]
    (found,) = [check for check in failed if message in check.found]
    assert "row 0 has" in found.found
    assert found.advice


def with_a_second_suffix(batch: Batch) -> dict[str, Tensor]:
    """The first row [S] of a batch with its suffix twice; their token types are 1 and 2."""
    length = int(batch["attention_mask"][0].sum())
    row = {name: batch[name][0, :length] for name in ("input_ids", "attention_mask", "token_type_ids", "labels")}
    suffix = row["token_type_ids"] == 1
    row = {name: torch.cat((values, values[suffix])) for name, values in row.items()}
    row["token_type_ids"][length:] = 2
    return row


def test_each_of_several_suffixes_has_to_end_in_eos(model: PaliGemma, batch: Batch) -> None:
    row, length = with_a_second_suffix(batch), int(batch["attention_mask"][0].sum())
    assert structure_of(model.config, row) == {}
    row["input_ids"][length - 1] = row["labels"][length - 1] = 9
    assert list(structure_of(model.config, row)) == ["<eos>"]


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]])
def test_the_leak_is_found_in_the_row_where_it_is(model: PaliGemma, batch: Batch, rows: list[int]) -> None:
    """By the network, and by the mask alone, which need not be told which token was edited."""
    batch["token_type_ids"][rows] = 0
    assert leaks_of(model, batch) == leaks_by_mask(batch) == rows
    assert torch.is_grad_enabled()
    leak = batch_checks(model.config, batch, rows, "by a test")[-1]
    assert (leak.name, leak.outcome) == ("leak", "fail")
    assert f"the answer of row {rows[0]} leaks into the prefix" in leak.found


def causal_suffixes(attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
    """A mask by which a suffix sees those before it."""
    length = attention_mask.shape[1]
    allowed = (token_type_ids == 0)[:, None, :] | torch.ones(length, length, dtype=torch.bool).tril()
    return (allowed & attention_mask.bool()[:, None, :])[:, None]


def test_a_suffix_that_sees_another_one_is_found(
    model: PaliGemma, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {name: values[None] for name, values in with_a_second_suffix(batch).items()}
    two["pixel_values"] = batch["pixel_values"][:1]
    assert leaks_of(model, two) == leaks_by_mask(two) == []
    for module in ("model.paligemma", "finetune.preflight.inspection"):
        monkeypatch.setattr(f"{module}.prefix_lm_mask", causal_suffixes)
    assert leaks_of(model, two) == leaks_by_mask(two) == [0]


def test_a_large_network_on_a_cpu_is_not_read_for_the_leak_test(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_config(("language.*",), 2, tmp_path)
    dimensions = network_config(ROOT / "assets/tiny-base", run)
    found, how = leaking_rows(run, dimensions, [batch])
    assert found == []
    assert "the network's states compared" in how
    monkeypatch.setattr("finetune.preflight.inspection.CHEAP", 1_000_000)
    monkeypatch.setattr("finetune.preflight.inspection.open_model", lambda *_: pytest.fail("weights are read"))
    found, how = leaking_rows(run, dimensions, [batch])
    assert found == []
    assert "by the attention mask alone" in how
