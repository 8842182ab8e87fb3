"""Connectors beside the libraries' own and the papers' formulas, and that they start as the pretrained projector."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PaliGemmaForConditionalGeneration
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from model import ConnectorConfig, PaliGemma, PaliGemmaConfig
from model.connectors import ResamplerConnector, dense_groups, make_connector, pixel_shuffle
from model.convert import changed, convert
from tests import tiny

CONNECTORS = {
    "linear": ConnectorConfig("linear"),
    "mlp": ConnectorConfig("mlp"),
    "dense_sci": ConnectorConfig("dense_sci"),
    "dense_dci": ConnectorConfig("dense_dci"),
    "resampler": ConnectorConfig("resampler", latents=5, depth=2, seed=3),
    "pixel_shuffle": ConnectorConfig("pixel_shuffle", factor=2),
}
TOKENS = {"resampler": 5, "pixel_shuffle": 4}  # of 16 patches; of others 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five vision layers, of which both kinds of dense connectors take several; four heads, one key/value head."""
    hf = tiny.config(vision__num_hidden_layers=5, vision__image_size=56, vision__num_attention_heads=4)
    hf["text_config"]["num_image_tokens"] = 16
    return tiny.save_library_model(tiny.library_model(hf, seed=5), tmp_path_factory.mktemp("connectors"))


def with_connector(base: Path, connector: ConnectorConfig, dtype: torch.dtype = torch.float32) -> PaliGemma:
    model = PaliGemma.from_pretrained(base, dtype=dtype)
    convert(model, changed(model.config, connector))
    return model


def images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, 56, 56, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1


def logits(model: PaliGemma, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, N + 6, V] of two images and a text."""
    tokens = torch.full((2, model.config.num_image_tokens), model.config.image_token_id)
    text = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        output: Tensor = model(torch.cat([tokens, text], dim=1), pixel_values=images(dtype=dtype)).logits
    return output


@pytest.mark.parametrize("name", CONNECTORS)
def test_number_of_tokens(base: Path, name: str) -> None:
    model = with_connector(base, CONNECTORS[name])
    assert model.config.num_image_tokens == TOKENS.get(name, 16)
    assert model.encode_images(images()).shape == (2, TOKENS.get(name, 16), 32)
    assert model.multi_modal_projector.training is False


@pytest.mark.parametrize("name", ["linear", "dense_sci", "dense_dci"])
def test_starts_as_the_pretrained_network_bit_for_bit(base: Path, name: str) -> None:
    expected = logits(PaliGemma.from_pretrained(base, dtype=torch.float32))
    assert torch.equal(logits(with_connector(base, CONNECTORS[name])), expected)


def test_the_mlp_starts_as_the_pretrained_network_up_to_rounding(base: Path) -> None:
    pretrained, mlp = (with_connector(base, CONNECTORS[name]).encode_images(images()) for name in ("linear", "mlp"))
    assert (mlp - pretrained).abs().max() <= 1e-6 * pretrained.abs().max()
    exact = [with_connector(base, CONNECTORS[name], torch.float64) for name in ("linear", "mlp")]
    pretrained, mlp = (logits(model, torch.float64) for model in exact)
    assert torch.allclose(mlp, pretrained, rtol=0, atol=1e-11)


def test_pixel_shuffle_starts_as_the_mean_of_projected_patches(base: Path) -> None:
    projected, shuffled = (
        with_connector(base, CONNECTORS[name], torch.float64).encode_images(images(dtype=torch.float64))
        for name in ("linear", "pixel_shuffle")
    )
    squares = projected.unflatten(1, (2, 2, 2, 2)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(shuffled, squares, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["dense_sci", "dense_dci"])
def test_the_dense_connector_is_the_papers_formula(base: Path, name: str) -> None:
    """One product with the features side by side, of the library's own hidden states."""
    model = with_connector(base, CONNECTORS[name], torch.float64)
    connector = model.multi_modal_projector
    tiny.randomize(connector, seed=7)
    last, states = hidden_states(base)
    groups = {"dense_sci": [states[1:2], states[3:4]], "dense_dci": [states[0:2], states[2:4]]}[name]
    means = [torch.stack(group).mean(dim=0) for group in groups]
    norms, linears = (connector.get_submodule(f"group_{part}").children() for part in ("norms", "linears"))
    side_by_side = torch.cat([last, *(norm(mean) for norm, mean in zip(norms, means, strict=True))], dim=-1)
    weight = torch.cat([connector.get_parameter("linear.weight"), *(one.get_parameter("weight") for one in linears)], 1)
    expected = side_by_side @ weight.t() + connector.get_parameter("linear.bias")
    torch.testing.assert_close(model.encode_images(images(dtype=torch.float64)), expected, rtol=1e-10, atol=1e-10)


def hidden_states(base: Path) -> tuple[Tensor, list[Tensor]]:
    """Of the library's vision tower in fp64: the features, and what enters each layer."""
    library = PaliGemmaForConditionalGeneration.from_pretrained(base, dtype=torch.float64).model.vision_tower
    states: list[Tensor] = []
    tower = getattr(library, "vision_model", library)
    for layer in tower.encoder.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    with torch.no_grad():
        features: Tensor = library(images(dtype=torch.float64)).last_hidden_state
    assert len(states) == 5
    return features, states


@pytest.mark.parametrize("name", ["dense_sci", "dense_dci"])
def test_what_starts_at_zero_gets_a_gradient(base: Path, name: str) -> None:
    model = with_connector(base, CONNECTORS[name]).requires_grad_(True)
    model.encode_images(images()).pow(2).sum().backward()
    linears = [p for n, p in model.multi_modal_projector.named_parameters() if n.startswith("group_linears")]
    assert len(linears) == 2
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in linears)


def test_groups_of_the_published_vision_tower() -> None:
    assert dense_groups("dense_sci", 27) == (range(7, 8), range(15, 16))
    assert dense_groups("dense_dci", 27) == (range(13), range(13, 26))


@pytest.mark.parametrize("heads", [2, 4, 8])
def test_the_resampler_is_the_librarys(heads: int) -> None:
    """Idefics2's, with random weights; of eight heads it has two key/value heads, of two two. Its norms compute in fp32
    whatever they are given, so in fp64 they are taken for what they are, and then replaced by norms in fp64.
    """
    narrow = heads // 4 or heads
    hf = tiny.config(vision__hidden_size=48, vision__num_attention_heads=heads)
    config = changed(PaliGemmaConfig.from_hf(hf), ConnectorConfig("resampler", latents=6, depth=3))
    ours = make_connector(config).double()
    assert isinstance(ours, ResamplerConnector)
    settings = Idefics2PerceiverConfig(
        hidden_size=48,
        hidden_act="silu",
        resampler_n_latents=6,
        resampler_depth=3,
        resampler_n_heads=heads,
        resampler_head_dim=48 // heads,
        num_key_value_heads=narrow,
        rms_norm_eps=config.vision.layer_norm_eps,
    )
    library = Idefics2PerceiverResampler(settings).double().eval()
    tiny.randomize(ours, seed=1)
    weights = {name.replace("latents.weight", "latents"): t for name, t in ours.state_dict().items()}
    library.load_state_dict({name: t for name, t in weights.items() if not name.startswith("linear.")})
    features = torch.randn(2, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mask = torch.ones(2, 9, dtype=torch.long)
        expected = ours.linear(library(context=features, attention_mask=mask))
        torch.testing.assert_close(ours(features), expected, rtol=0, atol=1e-5)
        for path, norm in ours.named_modules():
            if isinstance(norm, torch.nn.RMSNorm):
                library.set_submodule(path, norm)
        expected = ours.linear(library(context=features, attention_mask=mask))
        torch.testing.assert_close(ours(features), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", [2, 4])
def test_pixel_shuffle_orders_as_the_librarys(factor: int) -> None:
    features = torch.randn(2, 64, 6, generator=torch.Generator().manual_seed(0))
    expected = Idefics3Connector.pixel_shuffle(cast(Idefics3Connector, None), features, factor)
    assert torch.equal(pixel_shuffle(features, factor), expected)


def test_what_is_drawn_depends_on_the_seed_alone(base: Path) -> None:
    def drawn(seed: int, kind: str = "resampler") -> Tensor:
        connector = with_connector(base, ConnectorConfig(kind, start="random", seed=seed)).multi_modal_projector
        return torch.cat([parameter.flatten() for parameter in connector.parameters()]).detach()

    for kind in CONNECTORS:
        assert torch.equal(drawn(1, kind), drawn(1, kind))
        assert not torch.equal(drawn(1, kind), drawn(2, kind))


def test_random_starts_are_not_the_pretrained_network(base: Path) -> None:
    pretrained = logits(PaliGemma.from_pretrained(base, dtype=torch.float32))
    for kind in ("linear", "mlp", "dense_sci", "dense_dci"):
        assert not torch.allclose(logits(with_connector(base, ConnectorConfig(kind, start="random"))), pretrained)


@pytest.mark.parametrize("name", CONNECTORS)
def test_saved_and_opened_again(base: Path, tmp_path: Path, name: str) -> None:
    model = with_connector(base, CONNECTORS[name])
    tiny.randomize(model.multi_modal_projector, seed=9)
    model.save_pretrained(tmp_path)
    opened = PaliGemma.from_pretrained(tmp_path, dtype=torch.float32)
    assert opened.config.connector.kind == CONNECTORS[name].kind
    assert torch.equal(logits(opened), logits(model))
    if name == "linear":
        assert PaliGemmaForConditionalGeneration.from_pretrained(tmp_path) is not None
    else:
        with pytest.raises(ValueError, match="paligemma-lora"):
            AutoModelForImageTextToText.from_pretrained(tmp_path)
