"""The network against transformers' PaliGemmaForConditionalGeneration, run live on random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PaliGemmaForConditionalGeneration
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRotaryEmbedding
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from model import PaliGemma, TextConfig, VisionConfig, prefix_lm_mask
from model.checkpoint import canonical_name
from model.gemma import GemmaLayer, GemmaModel
from model.layers import KVCache, rotary_embedding
from model.ops.attention import attention_bias
from model.siglip import SiglipLayer
from tests import rounding, tiny
from tests.rounding import computed_by


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PaliGemmaForConditionalGeneration, PaliGemma]:
    library = tiny.library_model(tiny.CONFIG)
    directory = tiny.save_library_model(library, tmp_path_factory.mktemp("tiny"))
    return library, PaliGemma.from_pretrained(directory, dtype=torch.float32)


def ours_of(library: PaliGemmaForConditionalGeneration, directory: Path, dtype: torch.dtype) -> PaliGemma:
    return PaliGemma.from_pretrained(tiny.save_library_model(library, directory), dtype=dtype)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@torch.no_grad()
def assert_same_logits(library: PaliGemmaForConditionalGeneration, ours: PaliGemma, batch: dict[str, Tensor]) -> None:
    real = batch["attention_mask"].bool()
    rounding.assert_same(
        computed_by(ours, lambda model: model(**without_labels(batch)).logits[real]),
        computed_by(library, lambda model: model(**batch).logits[real]),
    )


@pytest.mark.parametrize("prompts", [[7], [5, 9, 3], [1, 1]])
@pytest.mark.parametrize("with_suffix", [False, True])
def test_logits_equal_the_library_at_every_real_position(pair: Any, prompts: list[int], with_suffix: bool) -> None:
    batch = tiny.batch(tiny.CONFIG, prompts, [2, 4, 1][: len(prompts)] if with_suffix else None)
    library, ours = pair
    assert_same_logits(library, ours, batch)


def test_gradients_equal_the_library(pair: Any) -> None:
    library, ours = pair
    batch = tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1])

    def gradients(model: Any) -> dict[str, Tensor]:
        model(**batch).loss.backward()
        network = model if isinstance(model, PaliGemma) else model.model
        return {str(canonical_name(name)): p.grad for name, p in network.named_parameters() if p.grad is not None}

    rounding.assert_same(computed_by(ours, gradients), computed_by(library, gradients))


@pytest.mark.parametrize("image_size", [448, 896])
def test_larger_images_equal_the_library(tmp_path: Path, image_size: int) -> None:
    hf = tiny.config(vision__image_size=image_size, vision__num_hidden_layers=1, text__num_hidden_layers=1)
    library = tiny.library_model(hf)
    assert_same_logits(library, ours_of(library, tmp_path, torch.float32), tiny.batch(hf, [3], [2]))


def test_a_vision_layer_of_true_width_equals_the_library() -> None:
    theirs = SiglipEncoderLayer(SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_attention_heads=16))
    theirs.self_attn.config._attn_implementation = "sdpa"
    tiny.randomize(theirs)
    ours = SiglipLayer(VisionConfig())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 256, 1152)
    with torch.no_grad():
        mine = computed_by(ours, lambda layer: layer(x.to(dtype_of(layer))))
        rounding.assert_same(mine, computed_by(theirs, lambda layer: layer(x.to(dtype_of(layer)), attention_mask=None)))


def test_a_decoder_layer_of_true_width_equals_the_library() -> None:
    hf = GemmaConfig(hidden_size=2048, intermediate_size=16384, num_attention_heads=8, num_key_value_heads=1)
    hf._attn_implementation = "sdpa"
    theirs = GemmaDecoderLayer(hf, 0)
    tiny.randomize(theirs)
    ours = GemmaLayer(TextConfig(), 0)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 48, 2048)
    position_ids = torch.arange(1, 49)[None]
    types = (torch.arange(48) >= 40).long()[None]
    mask = prefix_lm_mask(torch.ones_like(types), types)

    def run_ours(layer: GemmaLayer) -> Tensor:
        dtype = dtype_of(layer)
        output: Tensor = layer(
            x.to(dtype), rotary_embedding(position_ids, 256, 1e4, dtype), attention_bias(mask, dtype, heads=8)
        )
        return output

    def run_theirs(layer: GemmaDecoderLayer) -> Tensor:
        given = x.to(dtype_of(layer))
        output: Tensor = layer(given, attention_mask=mask, position_embeddings=rotary(given, position_ids))
        return output

    rotary = GemmaRotaryEmbedding(hf)
    with torch.no_grad():
        rounding.assert_same(computed_by(ours, run_ours), computed_by(theirs, run_theirs))


def test_bf16_is_as_close_to_fp32_as_the_librarys(pair: Any, tmp_path: Path) -> None:
    library, exact = pair
    directory = tiny.save_library_model(library, tmp_path)
    rounded_library = PaliGemmaForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16).eval()
    rounded = PaliGemma.from_pretrained(directory, dtype=torch.bfloat16)
    labelled = tiny.batch(tiny.CONFIG, [5, 9, 3, 12], [2, 4, 1, 3])
    batch = without_labels(labelled)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        reference = exact(**batch).logits[real]
        ours = (rounded(**batch).logits[real] - reference).abs().mean()
        theirs = (rounded_library(**labelled).logits[real] - reference).abs().mean()
    assert 0 < ours <= 1.2 * theirs


def moved(ours: PaliGemma, batch: dict[str, Tensor], position: int) -> list[bool]:
    """For each position, whether its logits move, in fp64, when the token at `position` is another one."""
    edited = {**batch, "input_ids": batch["input_ids"].clone()}
    edited["input_ids"][0, position] += 1

    def logits(given: dict[str, Tensor]) -> Tensor:
        return computed_by(ours, lambda model: model(**given).logits[0]).exact["0"]

    with torch.no_grad():
        before, after = logits(batch), logits(edited)
    return ((before - after).abs().amax(-1) > rounding.EXACT * before.abs().max()).tolist()


def test_an_edit_in_the_prefix_moves_the_first_position(pair: Any) -> None:
    batch = without_labels(tiny.batch(tiny.CONFIG, [5], [4]))
    assert moved(pair[1], batch, 4 + 3)[0]


@pytest.mark.parametrize("position", range(9, 13))
def test_an_edit_in_the_suffix_moves_nothing_before_it(pair: Any, position: int) -> None:
    batch = without_labels(tiny.batch(tiny.CONFIG, [5], [4]))
    change = moved(pair[1], batch, position)
    assert not any(change[:position])
    assert all(change[position:])


def test_padding_changes_nothing(pair: Any) -> None:
    batch = without_labels(tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1]))

    def together(model: PaliGemma) -> list[Tensor]:
        logits = model(**batch).logits
        return [row[mask] for row, mask in zip(logits, batch["attention_mask"].bool(), strict=True)]

    def one_by_one(model: PaliGemma) -> list[Tensor]:
        return [model(**row).logits[0] for row in tiny.rows_of(batch)]

    with torch.no_grad():
        rounding.assert_same(computed_by(pair[1], together), computed_by(pair[1], one_by_one))


@pytest.mark.parametrize("key_heads", [1, 2])
def test_heads_folded_and_unfolded_are_the_same_attention(key_heads: int) -> None:
    """In fp64: forward and gradients, of all positions, of some of them, and through a cache."""
    decoder = GemmaModel(TextConfig(32, 64, 2, 4, key_heads, head_dim=16, vocab_size=64)).double()
    tiny.randomize(decoder)
    mask = torch.tensor([[1] * 11, [1] * 8 + [0] * 3])
    types = (torch.arange(11) >= 7).long().expand(2, -1)
    positions, queries = torch.arange(1, 12).expand(2, -1), torch.tensor([[6, 7, 9], [6, 7, 1]])
    allowed, later = prefix_lm_mask(mask, types), torch.ones(2, 1, 1, 12, dtype=torch.bool)

    def outcome(folded: bool) -> list[Tensor]:
        decoder.fold_heads = folded
        x = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        whole, few = decoder(x, allowed, positions), decoder(x, allowed, positions, query_positions=queries)
        gradients = torch.autograd.grad(whole.pow(2).sum() + few.pow(3).sum(), [x, *decoder.layers.parameters()])
        with torch.no_grad():
            cache = KVCache(decoder.config, 2, 12, torch.float64, x.device)
            first = decoder(x, allowed, positions, cache, query_positions=queries[:, :1])
            second = decoder(x[:, :1], later, torch.full((2, 1), 12), cache)
        return [whole, few, first, second, *gradients]

    for one, other in zip(outcome(folded=True), outcome(folded=False), strict=True):
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()


def test_positions_count_from_one_as_in_the_library(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary attention sees differences only, so the logits would hardly tell."""
    seen: list[Tensor] = []

    def recorded(position_ids: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        seen.append(position_ids)
        return rotary_embedding(position_ids, *settings)

    monkeypatch.setattr("model.gemma.rotary_embedding", recorded)
    pair[1](**without_labels(tiny.batch(tiny.CONFIG, [5], [2])))
    pair[1].generate(**tiny.batch(tiny.CONFIG, [5, 3]), max_new_tokens=2)
    assert seen[0].tolist() == [list(range(1, 12))]
    assert seen[1].tolist() == [list(range(1, 10))] * 2
    assert seen[2].tolist() == [[10], [8]]  # the first new token, each behind its own prompt


def test_only_supervised_positions_reach_the_output_head_and_the_loss_equals_the_library(pair: Any) -> None:
    library, ours = pair
    batch = tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1])
    supervised = batch["labels"][:, 1:] != -100

    def run_ours(model: PaliGemma) -> list[Tensor]:
        out = model(**batch)
        assert out.logits.shape == (7, 128)
        return [out.logits, out.loss]

    def run_theirs(model: PaliGemmaForConditionalGeneration) -> list[Tensor]:
        out: Any = model(**batch)
        return [out.logits[:, :-1][supervised], out.loss]

    with torch.no_grad():
        rounding.assert_same(computed_by(ours, run_ours), computed_by(library, run_theirs))


def test_loss_is_divided_by_the_tokens_of_the_whole_step(pair: Any) -> None:
    batch = tiny.batch(tiny.CONFIG, [5, 9], [2, 4])

    def whole(model: PaliGemma) -> list[Tensor]:
        out = model(**batch)
        return [out.logits, out.loss]

    def row_by_row(model: PaliGemma) -> list[Tensor]:
        outs = [model(**row, num_items_in_batch=6) for row in tiny.rows_of(batch)]
        return [torch.cat([out.logits for out in outs]), torch.stack([out.loss for out in outs]).sum()]

    with torch.no_grad():
        rounding.assert_same(computed_by(pair[1], row_by_row), computed_by(pair[1], whole))


def test_recomputation_changes_no_gradient(pair: Any) -> None:
    batch = tiny.batch(tiny.CONFIG, [5, 9], [2, 4])
    gradients = []
    for layers in (0, 1, 9):
        ours = copy.deepcopy(pair[1])
        ours.language_model.model.set_recompute(layers)
        ours(**batch).loss.backward()
        gradients.append([parameter.grad for parameter in ours.parameters()])
    for recomputed in gradients[1:]:
        assert all(torch.equal(*both) for both in zip(recomputed, gradients[0], strict=True))


def test_image_features_stand_in_for_pixels(pair: Any) -> None:
    batch = tiny.batch(tiny.CONFIG, [5, 9], [2, 4])
    features = pair[1].encode_images(batch.pop("pixel_values"))
    with_pixels = tiny.batch(tiny.CONFIG, [5, 9], [2, 4])
    assert torch.equal(pair[1](**batch, image_features=features).loss, pair[1](**with_pixels).loss)


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "attention_mask": batch["attention_mask"].flip(1)}


def one_image_token_lost(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "input_ids": batch["input_ids"].masked_fill(torch.arange(17) == 2, 5)}


def without_types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}


def all_ignored(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def without_pixels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "pixel_values"}


def wrong_size(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "pixel_values": torch.zeros(2, 3, 56, 56)}


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (left_padded, "padded on the right"),
        (one_image_token_lost, r"hold \[3, 3\] image tokens"),
        (without_types, "labels need token_type_ids"),
        (all_ignored, "no supervised position"),
        (without_pixels, "no image"),
        (wrong_size, r"\(56, 56\) pixels, this checkpoint takes 28 x 28"),
    ],
)
def test_bad_batches_are_refused(
    pair: Any, corrupt: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pair[1](**corrupt(tiny.batch(tiny.CONFIG, [5, 9], [2, 4])))
