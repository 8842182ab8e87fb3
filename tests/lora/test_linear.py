"""LoRA: what is adapted, what is trained, and that the start is the base."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune import LoRAConfig, LoRALinear, inject_lora, remove_lora
from finetune.lora.dropout import Dropout, feature_keys
from finetune.lora.linear import adapter_table, matches
from finetune.lora.memory_efficient import memory_efficient_lora_linear, plain_lora_linear
from finetune.lora.protocol import AdapterSettings, trained_parameters
from model import PaliGemma
from tests import rounding, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PaliGemma:
    directory = tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))
    return PaliGemma.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def model(base: PaliGemma) -> PaliGemma:
    return copy.deepcopy(base)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1])


EVERYTHING = LoRAConfig(rank=4, targets=("language.*", "vision.*", "connector.*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bit_for_bit(model: PaliGemma, batch: dict[str, Tensor], dtype: torch.dtype) -> None:
    model.to(dtype)
    with torch.no_grad():
        before = model(**batch)
        inject_lora(
            model, LoRAConfig(rank=4, targets=("language.*", "vision.*"), modules_to_save=("connector.linear",))
        )
        after = model.train()(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_only_adapters_get_gradients_and_every_one_does(model: PaliGemma, batch: dict[str, Tensor]) -> None:
    inject_lora(model, EVERYTHING)
    model(**batch).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(trained_parameters(model))
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in trained_parameters(model).items()}
    assert all(gradients[name].abs().max() > 0 for name in trained if name.endswith("lora_B"))
    # B is zero at the start, so A stands still in the first step and moves from the second on.
    assert all(gradients[name].abs().max() == 0 for name in trained if name.endswith("lora_A"))


def test_the_adapter_stands_in_the_module_tree_and_is_used(model: PaliGemma, batch: dict[str, Tensor]) -> None:
    for path in inject_lora(model, EVERYTHING):
        adapter = model.get_submodule(path)
        assert isinstance(adapter, LoRALinear)
        with torch.no_grad():
            before = model(**batch).logits
            adapter.lora_B.normal_()
            assert not torch.equal(model(**batch).logits, before), f"{path} is not used by the forward pass"
            adapter.lora_B.zero_()


def test_a_and_b_are_not_both_zero_and_a_is_kaiming_uniform() -> None:
    adapter = LoRALinear(nn.Linear(400, 300), AdapterSettings(rank=64, alpha=64), key=7, seed=0)
    bound = 400**-0.5
    assert adapter.lora_A.abs().max() <= bound
    assert adapter.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not adapter.lora_B.any()


def test_the_start_is_seeded_and_does_not_depend_on_what_else_is_adapted(base: PaliGemma) -> None:
    def start(targets: tuple[str, ...], seed: int) -> Tensor:
        model = copy.deepcopy(base)
        inject_lora(model, LoRAConfig(rank=4, targets=targets), seed)
        adapter = model.get_submodule("language_model.model.layers.1.self_attn.q_proj")
        assert isinstance(adapter, LoRALinear)
        return adapter.lora_A

    assert torch.equal(start(("language.q_proj",), 1), start(("language.*", "vision.*"), 1))
    assert not torch.equal(start(("language.q_proj",), 1), start(("language.q_proj",), 2))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / 4)])
def test_scaling(rslora: bool, scale: float) -> None:
    linear = nn.Linear(6, 5)
    adapter = LoRALinear(linear, AdapterSettings(16, 32, rslora), key=0, seed=0)
    nn.init.normal_(adapter.lora_B)
    x = torch.randn(3, 6)

    def by_hand(adapter: LoRALinear) -> Tensor:
        given = x.to(adapter.weight.dtype)
        low_rank = given @ adapter.lora_A.T @ adapter.lora_B.T
        return nn.functional.linear(given, adapter.weight, adapter.bias) + scale * low_rank

    def merged(adapter: LoRALinear) -> Tensor:
        return nn.functional.linear(x.to(adapter.weight.dtype), adapter.merged_weight(), adapter.bias)

    expected = rounding.computed_by(adapter, by_hand)
    rounding.assert_same(rounding.computed_by(adapter, lambda module: module(x.to(module.weight.dtype))), expected)
    rounding.assert_same(rounding.computed_by(adapter, merged), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_adapted_linear_is_its_plain_formula_in_fp64(bias: bool, dropped: bool) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    weight, offset = random(30, 40), random(30) if bias else None
    inputs = [random(3, 7, 40), random(4, 40), random(30, 4)]
    dropout = Dropout(0.3, torch.tensor([5, -6, 7], dtype=torch.int32), feature_keys(9, 40)) if dropped else None
    found = []
    for function in (memory_efficient_lora_linear, plain_lora_linear):
        x, a, b = (tensor.clone().requires_grad_() for tensor in inputs)
        output = function(x, weight, offset, a, b, 1.7, dropout)
        output.square().sum().backward()
        found.append((output, x.grad, a.grad, b.grad))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_base_names_never_change(base: PaliGemma, model: PaliGemma) -> None:
    inject_lora(model, EVERYTHING)
    added = model.state_dict().keys() - base.state_dict().keys()
    assert base.state_dict().keys() <= model.state_dict().keys()
    assert all(name.endswith(("lora_A", "lora_B")) for name in added)


def test_ejecting_gives_the_base_back(base: PaliGemma, model: PaliGemma, batch: dict[str, Tensor]) -> None:
    path = "language_model.model.layers.0.self_attn.q_proj.weight"
    weight = model.get_parameter(path)
    config = LoRAConfig(
        rank=4, targets=("language.*", "vision.*"), modules_to_save=("connector.linear", "language.norm")
    )
    wrapped = inject_lora(model, config)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.normal_()
    assert not torch.equal(model(**batch).logits, base(**batch).logits)
    assert sorted(remove_lora(model)) == sorted(wrapped)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert model.get_parameter(path) is weight
    assert torch.equal(model(**batch).logits, base(**batch).logits)


PATHS = [
    ("language.q_proj", "language_model.model.layers.3.self_attn.q_proj", True),
    ("language.q_proj", "vision_tower.vision_model.encoder.layers.3.self_attn.q_proj", False),
    ("vision.q_proj", "vision_tower.vision_model.encoder.layers.3.self_attn.q_proj", True),
    ("language.3.q_proj", "language_model.model.layers.3.self_attn.q_proj", True),
    ("language.3.q_proj", "language_model.model.layers.13.self_attn.q_proj", False),
    ("language.layers.3.*", "language_model.model.layers.3.mlp.up_proj", True),
    ("language.self_attn.3.q_proj", "language_model.model.layers.3.self_attn.q_proj", False),
    ("language.proj", "language_model.model.layers.3.self_attn.q_proj", False),
    ("language.self_attn", "language_model.model.layers.3.self_attn.q_proj", False),
    ("connector.linear", "multi_modal_projector.linear", True),
    ("connector.*", "multi_modal_projector.linear", True),
    ("connector.*", "language_model.model.layers.3.mlp.up_proj", False),
]


@pytest.mark.parametrize(("target", "path", "expected"), PATHS)
def test_targets_name_whole_components_within_a_scope(target: str, path: str, expected: bool) -> None:
    assert matches(target, path) is expected


def test_the_default_adapts_all_language_linears_and_nothing_of_the_vision_tower(model: PaliGemma) -> None:
    wrapped = inject_lora(model, LoRAConfig(rank=2))
    assert len(wrapped) == 3 * 7
    assert all(path.startswith("language_model.") for path in wrapped)
    assert sum(count for _, _, count, _, _ in adapter_table(model)) == 21


def test_the_published_dimensions_give_the_published_number_of_parameters() -> None:
    """1,225,728 per unit of rank on all language linears of the 3B."""
    from model import PaliGemmaConfig

    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig())
    inject_lora(model, LoRAConfig(rank=2))
    assert sum(p.numel() for p in trained_parameters(model).values()) == 2 * 1_225_728


def test_patterns_give_some_targets_another_rank_and_alpha(model: PaliGemma) -> None:
    config = LoRAConfig(
        rank=4, alpha=8, rank_pattern={"language.q_proj": 2, "language.2.*": 6}, alpha_pattern={"language.0.*": 3}
    )
    inject_lora(model, config)
    found = {
        path: (adapter.settings.rank, adapter.settings.alpha)
        for path, adapter in model.named_modules()
        if isinstance(adapter, LoRALinear) and adapter.settings
    }
    layers = "language_model.model.layers"
    assert found[f"{layers}.0.self_attn.q_proj"] == (2, 3)
    assert found[f"{layers}.1.self_attn.v_proj"] == (4, 8)
    assert found[f"{layers}.2.self_attn.q_proj"] == (6, 8)
    assert adapter_table(model)[0] == ("language", "q_proj", 2, 2, 2 * 2 * (32 + 64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"targets": ("language.qproj",)},
            "'language.qproj' names nothing; the language scope has: down_proj, gate_proj",
        ),
        ({"targets": ("vision.o_proj",)}, "the vision scope has: fc1, fc2, k_proj, out_proj"),
        ({"targets": ()}, "nothing would be trained"),
        ({"rank_pattern": {"vision.fc1": 2}}, "'vision.fc1' names linears that no target adapts"),
        ({"modules_to_save": ("language.0.q_proj",)}, "named by targets and by modules_to_save"),
        ({"modules_to_save": ("language.embed_tokens",)}, "embed_tokens is also the output head"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_the_model_left_alone(
    model: PaliGemma, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**config))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_injecting_twice_is_refused(model: PaliGemma) -> None:
    inject_lora(model, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="remove_lora"):
        inject_lora(model, LoRAConfig(rank=2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank": 0}, "rank: got 0; expected whole number >= 1"),
        ({"alpha": 0.0}, "alpha: got 0; expected number > 0"),
        ({"dropout": 1.0}, "dropout: got 1; expected number >= 0, < 1"),
        (
            {"rank_pattern": {"language.q_proj": 0}},
            r"rank_pattern\.language\.q_proj: got 0; expected whole number >= 1",
        ),
        (
            {"targets": ("language.q_proj", "v_proj")},
            r"targets\.1: got 'v_proj'; expected SCOPE\.COMPONENT with scope language, vision, connector; did you mean "
            r"language\.v_proj\?",
        ),
        ({"targets": ("text.q_proj",)}, r"targets\.0: got 'text\.q_proj'; expected .*, such as language\.q_proj"),
        ({"modules_to_save": ("connector",)}, r"modules_to_save\.0: got 'connector'; expected .*"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern\.q_proj: got 'q_proj'; expected .* language\.q_proj\?"),
        ({"alpha_pattern": {"language.": 4.0}}, r"alpha_pattern\.language\.: got 'language\.'; expected .*"),
        ({"alpha_pattern": {"language.q_proj": -1.0}}, r"alpha_pattern\.language\.q_proj: got -1; expected number > 0"),
    ],
)
def test_what_no_network_can_have_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        LoRAConfig(**bad)


def test_modules_trained_in_full_are_fp32_and_train(model: PaliGemma, batch: dict[str, Tensor]) -> None:
    model.to(torch.bfloat16)
    inject_lora(model, LoRAConfig(targets=(), modules_to_save=("connector.linear", "language.input_layernorm")))
    parameters = trained_parameters(model)
    assert len(parameters) == 2 + 3
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    model(**batch).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters.values() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in parameters.values())
