"""Another resolution or connector: beside the library's interpolation, what is refused, what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration

from model import ConnectorConfig, PaliGemma, PaliGemmaConfig
from model.convert import apply_changes, changed, changes_of, convert
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf = tiny.config(vision__image_size=56)
    directory = tiny.save_library_model(tiny.library_model(hf, seed=5), tmp_path_factory.mktemp("convert"))
    form = {
        "size": {"height": 56, "width": 56},
        "image_seq_length": 16,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(form))
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": form, "processor_class": "x"}))
    return directory


def at_size(base: Path, size: int, dtype: torch.dtype = torch.float64) -> PaliGemma:
    model = PaliGemma.from_pretrained(base, dtype=dtype)
    convert(model, changed(model.config, image_size=size))
    return model


@pytest.mark.parametrize("size", [28, 84, 112, 224])
def test_another_resolution_is_the_librarys(base: Path, size: int) -> None:
    """Features of the library's vision tower, which interpolates while it runs, in fp64."""
    library = PaliGemmaForConditionalGeneration.from_pretrained(base, dtype=torch.float64).model.vision_tower
    pixels = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    model = at_size(base, size)
    assert model.config.num_image_tokens == (size // 14) ** 2
    with torch.no_grad():
        expected = library(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.vision_tower(pixels)[0], expected, rtol=1e-10, atol=1e-10)


def test_a_changed_resolution_is_saved_and_opens_in_the_library(base: Path, tmp_path: Path) -> None:
    model = at_size(base, 84, torch.float32)
    model.save_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 84, 84, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids = torch.tensor([[model.config.image_token_id] * 36 + [2, 5, 7]])
    library = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        ours = PaliGemma.from_pretrained(tmp_path, dtype=torch.float32)(ids, pixel_values=pixels).logits
        theirs = library(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, model(ids, pixel_values=pixels).logits)
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        form = json.loads((tmp_path / name).read_text())
        form = form[key] if key else form
        assert (form["size"], form["image_seq_length"]) == ({"height": 84, "width": 84}, 36)


def test_what_convert_did_can_be_told_and_done_again(base: Path) -> None:
    model = PaliGemma.from_pretrained(base)
    assert changes_of(model) == {}
    wanted = changed(model.config, ConnectorConfig("pixel_shuffle"), image_size=112, tiles=4, aspect="pad")
    before = model.state_dict()
    undo = convert(model, wanted)
    assert model.config == wanted
    told = json.loads(json.dumps(changes_of(model)))
    assert apply_changes(model.opened_config, told) == wanted
    undo()
    assert model.config == model.opened_config
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tiles_are_encoded_as_images_and_stand_side_by_side(base: Path) -> None:
    model = PaliGemma.from_pretrained(base, dtype=torch.float64)
    pixels = torch.rand(2, 5, 3, 56, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    each = model.encode_images(pixels.flatten(0, 1)).unflatten(0, (2, 5)).flatten(1, 2)
    convert(model, changed(model.config, tiles=4))
    assert model.config.num_image_tokens == 5 * 16
    torch.testing.assert_close(model.encode_images(pixels), each, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"pixel_values are \[2, 3, 56, 56\], this network takes \[images, 5, 3"):
        model.encode_images(pixels[:, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 60}, "60 pixels is no whole number of patches of 14 pixels.* such as 56"),
        ({"image_size": 7}, "such as 14"),
        ({"connector": ConnectorConfig("pixel_shuffle", factor=3)}, "4 is not divisible by 3"),
        ({"image_size": 14 * 100}, "an image would take 10,000 tokens .* the decoder has 8,192 positions"),
        ({"tiles": 3}, "tiles 3"),
        ({"aspect": "stretch"}, "'stretch'; expected 1 or 4, squash or pad"),
    ],
)
def test_what_does_not_fit_is_refused_from_the_configuration(base: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(PaliGemmaConfig.from_directory(base), **changes)


def test_an_unknown_connector_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'qformer' is not known here; expected linear, mlp, dense_sci, dense_dci"):
        ConnectorConfig("qformer")
    with pytest.raises(ValueError, match="connector: layers is not known here"):
        PaliGemmaConfig.from_hf(tiny.config(connector={"kind": "mlp", "layers": 3}))


def test_dense_connectors_need_layers_to_group() -> None:
    config = PaliGemmaConfig.from_hf(tiny.config(vision__num_hidden_layers=2))
    with pytest.raises(
        ValueError, match=r"dense_dci does not fit: .* the vision tower has 2 layers; expected 3 or more"
    ):
        changed(config, ConnectorConfig("dense_dci"))


def test_a_connector_that_is_not_the_published_one_is_not_replaced(base: Path) -> None:
    config = changed(PaliGemmaConfig.from_directory(base), ConnectorConfig("mlp"))
    with pytest.raises(ValueError, match="has the connector mlp, in whose place resampler \\(64, 3\\) cannot be put"):
        changed(config, ConnectorConfig("resampler"))
    assert changed(config, ConnectorConfig("mlp")) == config


@pytest.mark.parametrize(
    "changes",
    [[], {"size": 3}, {"connector": "mlp"}, {"image_size": "84"}, {"tiles": None}, {"connector": {"kind": "x"}}],
)
def test_changes_that_are_none_are_refused(base: Path, changes: Any) -> None:
    with pytest.raises(ValueError, match=r"expected|known here"):
        apply_changes(PaliGemmaConfig.from_directory(base), changes)
