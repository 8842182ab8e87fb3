"""Decoding against the library's `generate`, and against itself one row at a time."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration

from model import PaliGemma, generate
from model.generate import pick_token
from tests import rounding, tiny

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PaliGemmaForConditionalGeneration, PaliGemma]:
    library = tiny.library_model(tiny.CONFIG, seed=1)
    directory = tiny.save_library_model(library, tmp_path_factory.mktemp("tiny"))
    return library, PaliGemma.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_tokens_equal_the_library_and_a_batch_equals_its_rows(pair: Any, seed: int) -> None:
    library, ours = pair
    prompts = tiny.batch(tiny.CONFIG, [5, 12, 3], seed=seed)
    together = ours.generate(**prompts, max_new_tokens=NEW_TOKENS)
    for i, row in enumerate(tiny.rows_of(prompts)):
        reference = library.generate(**row, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=1)
        expected = reference[0, row["input_ids"].shape[1] :].tolist()
        assert ours.generate(**row, max_new_tokens=NEW_TOKENS)[0].tolist() == expected
        assert together[i, : len(expected)].tolist() == expected


def test_cached_steps_equal_full_forward_passes(pair: Any) -> None:
    """Each new token is the most likely one of a forward pass over the whole row so far, its type being suffix."""
    ours = pair[1]
    row = tiny.batch(tiny.CONFIG, [6])
    new = ours.generate(**row, max_new_tokens=NEW_TOKENS)[0]
    for token in new:
        logits = ours(**row).logits[0, -1]
        assert token == logits.argmax()
        for name, value in (("input_ids", token), ("attention_mask", 1), ("token_type_ids", 1)):
            row[name] = torch.cat((row[name], torch.as_tensor(value).view(1, 1)), dim=1)


def test_log_probabilities_are_the_librarys_and_zero_behind_the_end(pair: Any) -> None:
    """Of forward passes in fp64: the library's over the whole row, of the tokens that were chosen."""
    library, ours = (copy.deepcopy(model).double() for model in pair)
    prompts = tiny.batch(tiny.CONFIG, [5, 12], seed=3)
    eos = int(ours.generate(**prompts, max_new_tokens=4)[0, 1])
    ours.config = dataclasses.replace(ours.config, eos_token_id=eos)
    for sampling in ({}, {"temperature": 3.0, "seed": 1}):
        new = ours.generate_scored(**prompts, max_new_tokens=4, **sampling)
        assert torch.equal(new.tokens, ours.generate(**prompts, max_new_tokens=4, **sampling))
        for i, row in enumerate(tiny.rows_of(prompts)):
            tokens = new.tokens[i].tolist()
            length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
            whole = torch.cat([row["input_ids"], new.tokens[i : i + 1, :length]], dim=1)
            types = (torch.arange(whole.shape[1]) >= row["input_ids"].shape[1]).long()[None]
            with torch.no_grad():
                found = library(
                    input_ids=whole,
                    pixel_values=row["pixel_values"].double(),
                    token_type_ids=types,
                    attention_mask=torch.ones_like(whole),
                    labels=whole,  # the library's causal mask of the suffix is for training
                )
            expected = found.logits[0, -length - 1 : -1].log_softmax(-1).gather(1, new.tokens[i, :length, None])[:, 0]
            torch.testing.assert_close(new.log_probs[i, :length].double(), expected, rtol=0, atol=1e-5)
            assert not new.log_probs[i, length:].any()


def test_decoding_stops_when_every_row_has_finished(pair: Any) -> None:
    ours = pair[1]
    prompts = tiny.batch(tiny.CONFIG, [5, 12], seed=3)
    free = ours.generate(**prompts, max_new_tokens=NEW_TOKENS)
    assert free.shape == (2, NEW_TOKENS)
    assert len(set(free[0].tolist())) > 1
    eos = int(free[0, 1])
    stopping = dataclasses.replace(ours.config, eos_token_id=eos)
    original, ours.config = ours.config, stopping
    try:
        alone = ours.generate(**next(tiny.rows_of(prompts)), max_new_tokens=NEW_TOKENS)
        both = ours.generate(**prompts, max_new_tokens=NEW_TOKENS)
    finally:
        ours.config = original
    first_eos = free[0].tolist().index(eos)
    assert alone[0].tolist() == free[0, : first_eos + 1].tolist()  # eos is part of the output, nothing follows
    assert (both[0, first_eos + 1 :] == ours.config.pad_token_id).all()


def test_sampling_repeats_with_its_seed(pair: Any) -> None:
    prompts = tiny.batch(tiny.CONFIG, [5, 12])
    first, again, other = (
        pair[1].generate(**prompts, max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=0.95, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_follows_the_nucleus() -> None:
    """Of 0.5, 0.3, 0.15, 0.05 a top_p of 0.7 leaves the first two, in proportion 5 to 3."""
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log().expand(20_000, -1)
    numbers = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = pick_token(logits, 1.0, 0.7, numbers)
    assert set(tokens.tolist()) == {1, 3}
    assert (tokens == 1).float().mean().item() == pytest.approx(0.625, abs=0.02)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_the_least_and_the_largest_number_pick_a_token_that_can_be(top_p: float) -> None:
    """Also where sums of probabilities round: the first and the last token here are never sampled."""
    logits = torch.cat((torch.tensor([-torch.inf]), torch.zeros(1000), torch.tensor([-torch.inf])))
    numbers = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens = pick_token(logits.expand(2, -1), 1.0, top_p, numbers).tolist()
    assert all(1 <= token <= 1000 for token in tokens)
    assert top_p < 1 or tokens == [1, 1000]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}])
def test_a_row_with_a_seed_of_its_own_draws_the_same_alone_and_in_any_batch(
    pair: Any, settings: dict[str, Any]
) -> None:
    """Two samples of each prompt, in fp64: the prompts together, each alone, and each sample alone."""
    ours = copy.deepcopy(pair[1]).double()
    prompts = tiny.batch(tiny.CONFIG, [5, 12, 3])
    settings |= {"max_new_tokens": NEW_TOKENS, "temperature": 1.5}
    seeds = [11, 12, 13, 14, -15, 16]
    with rounding.KeepFP64():
        together = ours.generate_scored(**prompts, samples=2, seeds=seeds, **settings)
        for i, row in enumerate(tiny.rows_of(prompts)):
            alone = ours.generate_scored(**row, samples=2, seeds=seeds[2 * i : 2 * i + 2], **settings)
            assert torch.equal(alone.tokens, together.tokens[2 * i : 2 * i + 2])
            rounding.assert_exact(alone.log_probs, together.log_probs[2 * i : 2 * i + 2])
            for sample in (2 * i, 2 * i + 1):
                one = ours.generate(**row, seeds=[seeds[sample]], **settings)
                assert torch.equal(one[0], together.tokens[sample, : one.shape[1]])
    assert len({tuple(row) for row in together.tokens.tolist()}) == len(seeds)


def test_samples_and_seeds_that_do_not_fit_are_refused(pair: Any) -> None:
    prompts = tiny.batch(tiny.CONFIG, [5, 12])
    with pytest.raises(ValueError, match="got 3 seeds for 4 rows; expected one for each, or none"):
        pair[1].generate(**prompts, temperature=1.0, samples=2, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="samples=0: expected at least 1"):
        pair[1].generate(**prompts, samples=0)


def test_an_image_token_that_was_written_is_an_ordinary_token(pair: Any) -> None:
    """Behind it the network goes on as a forward pass over the whole row does, and the row can be learned from."""
    ours = copy.deepcopy(pair[1]).double()
    row = tiny.batch(tiny.CONFIG, [6])
    features = ours.encode_images(row.pop("pixel_values").double())
    prompt = row["input_ids"].shape[1]
    written = torch.tensor([[ours.config.image_token_id, 7, 1]])
    whole = torch.cat((row["input_ids"], written), dim=1)
    types = (torch.arange(whole.shape[1]) >= prompt).long()[None]
    labels = torch.where(types == 1, whole, -100)
    logits = ours(whole, token_type_ids=types, labels=labels, image_features=features).logits  # (3, V)
    with pytest.MonkeyPatch.context() as patched:
        forced = iter(written[0, :2])
        patched.setattr(generate, "pick_token", lambda *_: next(forced)[None])
        new = ours.generate_scored(**row, image_features=features, max_new_tokens=2)
    expected = logits.log_softmax(-1).gather(1, written.T)[:2, 0].detach()
    torch.testing.assert_close(new.log_probs[0].double(), expected, rtol=0, atol=1e-5)


def test_a_tiny_nucleus_and_a_tiny_temperature_are_greedy(pair: Any) -> None:
    prompts = tiny.batch(tiny.CONFIG, [5, 12])
    greedy = pair[1].generate(**prompts, max_new_tokens=NEW_TOKENS)
    for settings in ({"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-4}):
        assert torch.equal(pair[1].generate(**prompts, max_new_tokens=NEW_TOKENS, **settings), greedy)


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"temperature": 1.0, "top_p": 1.5}]
)
def test_impossible_settings_are_refused(pair: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected max_new_tokens"):
        pair[1].generate(**tiny.batch(tiny.CONFIG, [5]), **settings)


def test_left_padded_prompts_are_refused(pair: Any) -> None:
    prompts = tiny.batch(tiny.CONFIG, [5, 12])
    prompts["attention_mask"] = prompts["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="pad prompts on the right"):
        pair[1].generate(**prompts)
