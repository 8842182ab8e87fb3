"""Adapters of another network than the checkpoint's: saved, opened, refused, merged, and what PEFT makes of them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

import merge_lora as merge_script
from finetune import LoRAConfig, inject_lora, load_adapter, remove_lora, save_adapter
from finetune.adapters.fingerprint import fingerprint
from finetune.adapters.merge import merge_checkpoint
from finetune.adapters.network import adapted_config, changes_in
from finetune.adapters.start_from import load_connector
from finetune.lora.nf4 import open_base
from finetune.lora.protocol import adapters, trained_parameters
from finetune.training.examples import processor_of
from model import ConnectorConfig, PaliGemma
from model.convert import changed, convert
from tests import tiny

ROOT = Path(__file__).parents[2]
CONNECTORS: dict[str, dict[str, Any]] = {
    "mlp": {"connector": ConnectorConfig("mlp")},
    "dense_sci": {"connector": ConnectorConfig("dense_sci")},
    "dense_dci": {"connector": ConnectorConfig("dense_dci")},
    "resampler": {"connector": ConnectorConfig("resampler", latents=3, depth=2, seed=5)},
    "pixel_shuffle": {"connector": ConnectorConfig("pixel_shuffle", factor=2)},
    "linear, random": {"connector": ConnectorConfig("linear", start="random", seed=5)},
    "mlp, random": {"connector": ConnectorConfig("mlp", start="random", seed=5)},
}
IMAGES: dict[str, dict[str, Any]] = {
    "size": {"image_size": 84},
    "tiles": {"tiles": 4},
    "aspect": {"aspect": "pad"},
    "all": {"connector": ConnectorConfig("pixel_shuffle", factor=3), "image_size": 84, "tiles": 4, "aspect": "pad"},
}
NETWORKS = CONNECTORS | IMAGES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 x 4 patches; with weights in fp32, as published, so that bf16 rounds them."""
    hf = tiny.config(vision__image_size=56)
    return tiny.save_library_model(tiny.library_model(hf, seed=5), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Of each network an adapter on the disk, and the logits that it had."""
    directory = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, changes in NETWORKS.items():
        model = adapted(base, changes)
        save_adapter(model, directory / name, str(base))
        found[name] = (directory / name, logits(model))
    return found


def adapted(base: Path, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> PaliGemma:
    """As after training: a new connector in full, LoRA in the decoder, all values off their start."""
    model = PaliGemma.from_pretrained(base, dtype=dtype)
    convert(model, changed(model.config, **changes))
    full = ("connector.*",) if "connector" in changes else ()
    inject_lora(model, LoRAConfig(rank=2, targets=("language.q_proj", "language.down_proj"), modules_to_save=full))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@torch.inference_mode()
def logits(model: PaliGemma) -> Tensor:
    """Of two rows with images of their own."""
    generator, config = torch.Generator().manual_seed(1), model.config
    pixels = torch.rand(2, *config.pixel_shape, generator=generator) * 2 - 1
    text = torch.randint(3, config.image_token_id, (2, 7), generator=generator)
    ids = torch.cat([torch.full((2, config.num_image_tokens), config.image_token_id), text], dim=1)
    found: Tensor = model(ids, pixel_values=pixels.to(model.dtype)).logits
    return found


def state_of(model: PaliGemma) -> tuple[Any, dict[str, Tensor]]:
    return model.config, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def require_untouched(model: PaliGemma, before: tuple[Any, dict[str, Tensor]]) -> None:
    config, tensors = state_of(model)
    assert (config, tensors.keys()) == (before[0], before[1].keys())
    assert not any(adapters(model))
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_loaded_into_a_fresh_base_the_logits_are_the_same_bits(
    base: Path, saved: dict[str, tuple[Path, Tensor]], name: str
) -> None:
    directory, expected = saved[name]
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    plain = logits(model)
    load_adapter(model, directory)
    assert torch.equal(logits(model), expected)
    assert expected.shape != plain.shape or not torch.equal(plain, expected)
    assert model.config == changed(model.opened_config, **NETWORKS[name]) == adapted_config(base, directory)
    stored = json.loads((directory / "adapter_config.json").read_text())["network"]
    assert stored.keys() == NETWORKS[name].keys()
    for key in stored.keys() - {"connector"}:
        assert stored[key] == NETWORKS[name][key]
    if "connector" in stored:
        assert ConnectorConfig(**stored["connector"]) == NETWORKS[name]["connector"]
    remove_lora(model)
    load_adapter(model, directory)  # into the network that it made
    assert torch.equal(logits(model), expected)


def test_an_adapter_of_the_published_network_says_nothing_of_it(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(base, {}), tmp_path / "plain", str(base))
    stored = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA"
    assert not {"network", "opens_in"} & stored.keys()
    assert changes_in(tmp_path / "plain") == {}


@pytest.mark.parametrize("name", ["dense_dci", "mlp, random", "size", "all"])
def test_trained_in_bf16_it_is_opened_in_fp32_on_the_same_base(base: Path, tmp_path: Path, name: str) -> None:
    """A checkpoint in fp32: interpolated positions and a connector's start are other numbers in bf16."""
    save_adapter(adapted(base, NETWORKS[name], torch.bfloat16), tmp_path / "adapter", str(base))
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    load_adapter(model, tmp_path / "adapter")
    assert merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", torch.float32).problems() == []


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "weight",
    ["multi_modal_projector.linear.weight", "vision_tower.vision_model.embeddings.position_embedding.weight"],
)
def test_another_base_is_refused_by_its_values_also_where_they_were_replaced(
    base: Path, saved: dict[str, tuple[Path, Tensor]], name: str, weight: str
) -> None:
    other = PaliGemma.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        other.get_parameter(weight).mul_(1.5)
    before = state_of(other)
    with pytest.raises(ValueError, match=r"was trained on another base than this, whose weights have other values"):
        load_adapter(other, saved[name][0])
    require_untouched(other, before)


def test_the_fingerprint_is_the_bases_before_and_after_a_conversion(base: Path) -> None:
    for changes in NETWORKS.values():
        model = PaliGemma.from_pretrained(base, dtype=torch.float32)
        plain = fingerprint(model)
        undo = convert(model, changed(model.config, **changes))
        assert fingerprint(model) == fingerprint(model.to(torch.bfloat16)) == plain
        undo()
        assert fingerprint(model) == plain
        assert model.replaced == {}


@pytest.mark.parametrize("name", ["dense_dci", "resampler", "all"])
def test_a_base_with_another_connector_is_refused_by_name(
    base: Path, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path, name: str
) -> None:
    merge_checkpoint(base, saved["mlp"][0], tmp_path / "mlp", torch.float32)
    model = PaliGemma.from_pretrained(tmp_path / "mlp", dtype=torch.float32)
    before = state_of(model)
    kind = NETWORKS[name]["connector"].kind
    with pytest.raises(ValueError, match=rf"{name} does not fit this base: .* the connector mlp, .*{kind}.* cannot be"):
        load_adapter(model, saved[name][0])
    require_untouched(model, before)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_checkpoint_it_was_merged_into_is_refused(
    base: Path, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path, name: str
) -> None:
    """Also where a connector that was drawn would be drawn anew."""
    merge_checkpoint(base, saved[name][0], tmp_path / "merged", torch.float32)
    model = PaliGemma.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"{name} was trained on another base than this"):
        load_adapter(model, saved[name][0])
    require_untouched(model, before)


def test_a_converted_network_takes_no_adapter_of_another(
    base: Path, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    save_adapter(adapted(base, {}), tmp_path / "plain", str(base))
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    convert(model, changed(model.config, ConnectorConfig("mlp"), tiles=4))
    before = state_of(model)
    differences = {
        saved["resampler"][
            0
        ]: r"model\.connector: mlp, in the adapter resampler \(3, 2\)\n.*\n  image\.tiles: 4, in .* 1",
        tmp_path / "plain": r"model\.connector: mlp, in the adapter linear\n  image\.tiles: 4, in the adapter 1",
        saved["mlp, random"][0]: r"connector\.start: pretrained, in the adapter random\n  connector\.seed: 0, in .* 5",
    }
    for directory, named in differences.items():
        with pytest.raises(ValueError, match=r"was trained on another network than this; .*\n  " + named):
            load_adapter(model, directory)
        require_untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_merged_it_opens_here_with_the_logits_of_base_and_adapter(
    base: Path, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    directory, expected = saved[name]
    report = merge_checkpoint(base, directory, tmp_path / "merged", dtype)
    assert report.problems() == []
    opened = PaliGemma.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    wanted = changed(opened.config if name == "size" else PaliGemma.from_pretrained(base).config, **NETWORKS[name])
    assert opened.config.connector.kind == wanted.connector.kind
    assert (opened.config.tiles, opened.config.aspect) == (wanted.tiles, wanted.aspect)
    assert opened.config.pixel_shape == wanted.pixel_shape
    found = logits(opened)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert (found - expected).pow(2).mean().sqrt() < 4 * report.rounding
    stored = json.loads((tmp_path / "merged/config.json").read_text())
    is_own = name not in ("size", "linear, random")
    assert ("opens_in" in stored, stored["model_type"] == "paligemma-lora") == (is_own, is_own)


@pytest.mark.parametrize(("name", "is_own"), [("dense_dci", True), ("aspect", True), ("size", False)])
def test_the_console_says_where_a_merged_checkpoint_opens(
    base: Path,
    saved: dict[str, tuple[Path, Tensor]],
    tmp_path: Path,
    name: str,
    is_own: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    merge_script.main([str(saved[name][0]), "--output", str(tmp_path / "merged"), "--dtype", "float32"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "verified" in shown
    assert (
        "merged opens in this toolkit alone: transformers has no such connector, tiles or padding" in shown
    ) == is_own


def test_at_another_resolution_transformers_opens_it_with_its_processor(tmp_path: Path) -> None:
    """An image and a prompt give the same tokens, pixels and logits there as here."""
    model = adapted(ROOT / "assets/tiny-base", {"image_size": 84})
    save_adapter(model, tmp_path / "adapter", str(ROOT / "assets/tiny-base"))
    merge_checkpoint(ROOT / "assets/tiny-base", tmp_path / "adapter", tmp_path / "merged", torch.float32)
    image = Image.effect_mandelbrot((90, 61), (-2, -1, 1, 1), 50).convert("RGB")
    image.save(tmp_path / "image.png")
    ours = processor_of(tmp_path / "merged", adapted_config(tmp_path / "merged", None))
    mine = ours([tmp_path / "image.png"], ["answer en what is this?"])
    theirs = AutoProcessor.from_pretrained(tmp_path / "merged")(
        images=image, text="<image>answer en what is this?", return_tensors="pt"
    )
    assert theirs["input_ids"].tolist() == mine["input_ids"].tolist()
    torch.testing.assert_close(theirs["pixel_values"], mine["pixel_values"], rtol=0, atol=1e-6)
    library: Any = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    here = PaliGemma.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected = library(**theirs).logits
        found = here(mine["input_ids"], pixel_values=mine["pixel_values"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_connector_on_a_base_in_four_bits(base: Path, tmp_path: Path) -> None:
    """Trained on NF4, opened on NF4, merged into the full base."""
    pytest.importorskip("bitsandbytes")
    model = open_base(base, torch.float32, "cpu", "nf4")
    convert(model, changed(model.config, **NETWORKS["dense_dci"]))
    inject_lora(model, LoRAConfig(rank=2, targets=("language.q_proj",), modules_to_save=("connector.*",)))
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, tmp_path / "adapter", str(base))
    opened = open_base(base, torch.float32, "cpu", "nf4")
    load_adapter(opened, tmp_path / "adapter")
    assert torch.equal(logits(opened), logits(model))
    report = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", torch.float32)
    assert report.problems() == []
    assert report.from_nf4["full"] > 0


@pytest.mark.parametrize("name", ["mlp", "dense_dci", "pixel_shuffle", "size", "tiles", "aspect"])
def test_peft_refuses_what_it_would_load_without_its_network(
    base: Path, saved: dict[str, tuple[Path, Tensor]], name: str
) -> None:
    library = PaliGemmaForConditionalGeneration.from_pretrained(base)
    with pytest.raises(KeyError, match="LORA_ON_CHANGED_NETWORK"):
        PeftModel.from_pretrained(library, saved[name][0])
    with pytest.raises(KeyError, match="LORA_ON_CHANGED_NETWORK"):
        AutoPeftModel.from_pretrained(saved[name][0])
    stored = json.loads((saved[name][0] / "adapter_config.json").read_text())
    assert stored["opens_in"].startswith("this toolkit alone")


def test_peft_would_load_it_with_a_warning_if_its_type_were_peft_s(
    base: Path, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """What the type of its own is for."""
    shutil.copytree(saved["dense_dci"][0], tmp_path / "adapter")
    edit(tmp_path / "adapter", lambda config: config.update(peft_type="LORA"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(PaliGemmaForConditionalGeneration.from_pretrained(base), tmp_path / "adapter")
    assert any("'network'" in str(warning.message) for warning in said)


def edit(directory: Path, change: Any) -> None:
    """Change an adapter's configuration, as a person does: without the manifest."""
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    (directory / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (None, "the changes are None; expected an object with some of connector, image_size"),
        ([], r"the changes are \[\]"),
        ({}, r"the changes are \{\}"),
        ("mlp", "the changes are 'mlp'"),
        ({"size": 84}, "the changes are {'size': 84}"),
        ({"connector": None}, "the connector is None; expected an object"),
        ({"connector": "mlp"}, "the connector is 'mlp'"),
        ({"connector": {"kind": "mpl"}}, "connector 'mpl' is not known here; expected linear, mlp"),
        ({"connector": {"kind": None}}, "connector None is not known"),
        ({"connector": {"kind": ["mlp"]}}, "is not known"),
        ({"connector": {"kind": "mlp", "layers": 2}}, "connector: layers is not known here"),
        ({"connector": {"kind": "resampler", "latents": "3"}}, "latents of the connector is '3'"),
        ({"connector": {"kind": "resampler", "latents": True}}, "latents of the connector is True"),
        ({"connector": {"kind": "resampler", "latents": 0}}, "latents of the connector is 0"),
        ({"connector": {"kind": "mlp", "start": None}}, "not from None"),
        ({"image_size": "84"}, "image_size is '84'; expected 1 to"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 84.0}, r"image_size is 84\.0"),
        ({"image_size": None}, "image_size is None"),
        ({"image_size": 2**40}, "image_size is 1099511627776"),
        ({"tiles": True}, "tiles is True; expected 1 or 4"),
        ({"tiles": 2}, "tiles is 2; expected 1 or 4"),
        ({"tiles": [4]}, r"tiles is \[4\]"),
        ({"aspect": "stretch"}, "aspect is 'stretch'; expected squash or pad"),
        ({"aspect": {}}, r"aspect is \{\}"),
        ({"image_size": 85}, "85 pixels is no whole number of patches of 14 pixels: take a multiple of 14, such as 84"),
        ({"image_size": 14 * 200}, r"40,000 tokens .* the decoder has 8,192 positions: take smaller images"),
        (
            {"connector": {"kind": "pixel_shuffle", "factor": 3}},
            "4 is not divisible by 3; take a factor that divides it",
        ),
    ],
)
def test_a_corrupted_network_is_named_and_the_model_left_alone(
    base: Path, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path, network: Any, named: str
) -> None:
    """By whoever opens the adapter: into a model, for its dimensions, to merge it."""
    shutil.copytree(saved["tiles"][0], tmp_path / "adapter")
    edit(tmp_path / "adapter", lambda config: config.update(network=network))
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    before = state_of(model)
    with pytest.raises(ValueError, match=named) as refused:
        load_adapter(model, tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(refused.value)
    require_untouched(model, before)
    with pytest.raises(ValueError, match=named):
        adapted_config(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=named):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", torch.float32)


def test_a_network_that_was_taken_out_is_missed(
    base: Path, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """Tiles leave no trace in the weights: nothing else would tell."""
    for number, change in enumerate(
        (lambda config: config.pop("network"), lambda config: config.update(peft_type="LORA"))
    ):
        directory = tmp_path / str(number)
        shutil.copytree(saved["tiles"][0], directory)
        edit(directory, change)
        with pytest.raises(
            ValueError, match=r"adapter_config\.json has peft_type .*expected peft_type ending in _ON_CHA"
        ):
            load_adapter(PaliGemma.from_pretrained(base, dtype=torch.float32), directory)


def test_a_connector_is_taken_from_an_adapter_with_the_same_one_only(
    base: Path, saved: dict[str, tuple[Path, Tensor]]
) -> None:
    """Dense ones have tensors of the same names and shapes: the kind counts. The resolution does not."""
    for size in (56, 84):
        model = PaliGemma.from_pretrained(base, dtype=torch.float32)
        convert(model, changed(model.config, image_size=size, **NETWORKS["dense_dci"]))
        inject_lora(model, LoRAConfig(rank=2, targets=(), modules_to_save=("connector.*",)))
        load_connector(model, saved["dense_dci"][0])
        trained, expected = trained_parameters(model), trained_parameters(adapted(base, NETWORKS["dense_dci"]))
        assert len(trained) == 2 + 2 * 3
        assert all(torch.equal(parameter, expected[name]) for name, parameter in trained.items())
    refused = {
        "dense_sci": r"has the connector dense_sci, and model\.connector is dense_dci: name an adapter, or a run, with",
        "mlp": r"has the connector mlp, and",
        "size": r"does not train the connector dense_dci: .*\n  missing \(8\): multi_modal_projector\.linear\.weight",
    }
    for name, message in refused.items():
        with pytest.raises(ValueError, match=rf"{name}, which connector\.start_from names, {message}"):
            load_connector(model, saved[name][0])
        assert all(torch.equal(parameter, expected[name]) for name, parameter in trained.items())


def test_on_a_base_with_its_own_connector_an_adapter_says_which_it_trains(
    base: Path, saved: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    """It was not changed there, but the names of its tensors do not tell it from another."""
    merge_checkpoint(base, saved["dense_sci"][0], tmp_path / "merged", torch.float32)
    model = adapted(tmp_path / "merged", {"connector": ConnectorConfig("dense_sci")})
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "merged"))
    assert changes_in(tmp_path / "adapter")["connector"]["kind"] == "dense_sci"
    opened = PaliGemma.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    load_adapter(opened, tmp_path / "adapter")
    assert torch.equal(logits(opened), logits(model))
    plain = PaliGemma.from_pretrained(base, dtype=torch.float32)
    before = state_of(plain)
    with pytest.raises(ValueError, match="was trained on another base"):
        load_adapter(plain, tmp_path / "adapter")
    require_untouched(plain, before)
    model = PaliGemma.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    inject_lora(model, LoRAConfig(rank=2, targets=("language.q_proj",)))
    save_adapter(model, tmp_path / "language", str(tmp_path / "merged"))
    assert changes_in(tmp_path / "language") == {}
