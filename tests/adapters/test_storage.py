"""Adapters on disk: ours open in PEFT, PEFT's open here, and nothing lands where it does not belong."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration

from finetune import LoRAConfig, inject_lora, load_adapter, remove_lora, save_adapter
from finetune.adapters.metadata import TrainingFacts, training_facts
from finetune.adapters.storage import LAYOUTS, PREFIX
from finetune.lora.protocol import trained_parameters
from model import PaliGemma, PaliGemmaConfig
from model.checkpoint import canonical_name
from tests import rounding, tiny
from tests.rounding import Computed, computed_by

Pair = tuple[PaliGemmaForConditionalGeneration, PaliGemma]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    library = tiny.library_model(tiny.CONFIG)
    directory = tiny.save_library_model(library, tmp_path_factory.mktemp("tiny"))
    return library, PaliGemma.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def pair(bases: Pair) -> Pair:
    return copy.deepcopy(bases)


def logits(model: Any) -> Tensor:
    """At every real position. Transformers 4 needs labels for the prefix-LM mask; ours then gives those only."""
    batch = tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1])
    if isinstance(model, PaliGemma):
        del batch["labels"]
    with torch.no_grad():
        result: Tensor = model.eval()(**batch).logits[batch["attention_mask"].bool()]
    return result


def computed_logits(model: Any) -> Computed:
    """In fp64 and in fp32."""
    return computed_by(model, logits)


def largest_change(now: Computed, before: Computed) -> float:
    return (now.exact["0"] - before.exact["0"]).abs().max().item()


def randomize(model: PaliGemma) -> None:
    """Adapters with an effect."""
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.02)


CONFIGS = {
    "language": LoRAConfig(rank=4, alpha=8),
    "attention": LoRAConfig(rank=4, alpha=4, targets=("language.q_proj", "language.v_proj")),
    "both towers": LoRAConfig(rank=4, targets=("language.*", "vision.*", "connector.linear")),
    "some layers": LoRAConfig(rank=4, targets=("language.2.*", "language.0.q_proj", "vision.1.fc1", "vision.fc2")),
    "rslora": LoRAConfig(rank=4, alpha=8, rslora=True),
    "patterns": LoRAConfig(
        rank=4,
        alpha=8,
        targets=("language.*", "vision.*"),
        rank_pattern={"language.q_proj": 2, "vision.2.fc1": 3},
        alpha_pattern={"language.1.q_proj": 5, "vision.q_proj": 2},
    ),
    "in full": LoRAConfig(
        rank=4, targets=("vision.fc1",), modules_to_save=("connector.linear", "language.input_layernorm")
    ),
    "vision in full": LoRAConfig(
        rank=4, targets=("language.q_proj",), modules_to_save=("vision.layer_norm1", "vision.post_layernorm")
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_saved_here_opens_in_peft_with_our_logits(pair: Pair, tmp_path: Path, name: str) -> None:
    library, ours = pair
    before = computed_logits(ours)
    inject_lora(ours, CONFIGS[name])
    randomize(ours)
    save_adapter(ours, tmp_path, base="google/paligemma-3b-pt-224", revision="bfloat16")
    expected = computed_logits(ours)
    assert largest_change(expected, before) > 0.1
    opened = PeftModel.from_pretrained(library, str(tmp_path))
    adapted = {canonical_name(key.removeprefix(PREFIX)) for key in opened.state_dict() if ".default." in key}
    assert len(adapted) == len(trained_parameters(ours))
    rounding.assert_same(computed_logits(opened), expected)
    with opened.disable_adapter():
        rounding.assert_same(computed_logits(opened), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_saved_here_opens_here(pair: Pair, tmp_path: Path, name: str) -> None:
    ours = pair[1]
    wrapped = inject_lora(ours, CONFIGS[name])
    randomize(ours)
    save_adapter(ours, tmp_path)
    expected, stored = logits(ours), trained_parameters(ours)
    remove_lora(ours)
    assert sorted(load_adapter(ours, tmp_path)) == sorted(wrapped)
    assert torch.equal(logits(ours), expected)
    assert all(torch.equal(parameter, stored[key]) for key, parameter in trained_parameters(ours).items())
    trained = {id(parameter) for parameter in ours.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in trained_parameters(ours).values()}


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "bare names, both towers": {"target_modules": ["q_proj", "v_proj"]},
    "a regular expression": {"target_modules": r"(.*(language_model).*(down_proj|gate_proj|q_proj).*$|.*(absent).*$)"},
    "all-linear names": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "fc1", "fc2", "linear"]
    },
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"language_model.layers.0.self_attn.q_proj": 32},
    },
    "rslora, gaussian": {"target_modules": ["o_proj"], "use_rslora": True, "init_lora_weights": "gaussian"},
    "exclusion": {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
    "modules to save": {"target_modules": ["o_proj"], "modules_to_save": ["multi_modal_projector.linear"]},
    "all-linear": {"target_modules": "all-linear"},
    "layers": {"target_modules": ["q_proj", "up_proj", "linear"], "layers_to_transform": [0, 2]},
    "one layer, pattern": {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "layers, patterns": {"target_modules": ["fc1"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    "anchored patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {r"^model\.language_model\.layers\.0\.self_attn\.q_proj$": 2, r"^up_proj$": 7},
        "alpha_pattern": {"^.*up_proj$": 32},
    },
    "exclusions": {"target_modules": ["q_proj", "fc1"], "exclude_modules": ["layers.1.self_attn.q_proj", "fc1"]},
    "the connector to save": {"target_modules": ["o_proj"], "modules_to_save": ["multi_modal_projector"]},
    "norms to save": {"target_modules": ["o_proj"], "modules_to_save": ["norm"]},
    "an MLP to save": {"target_modules": ["q_proj", "up_proj", "fc1"], "modules_to_save": ["layers.1.mlp"]},
    "biases of what has none": {"target_modules": ["up_proj"], "bias": "lora_only"},
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_an_adapter_saved_by_peft_opens_here_with_its_logits(pair: Pair, tmp_path: Path, name: str) -> None:
    library, ours = pair
    before = computed_logits(ours)
    wrapped = get_peft_model(library, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **PEFT_CONFIGS[name]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    wrapped.save_pretrained(str(tmp_path))
    load_adapter(ours, tmp_path)
    expected = computed_logits(wrapped)
    assert largest_change(expected, before) > 0.1
    rounding.assert_same(computed_logits(ours), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_three_path_layouts_are_read(pair: Pair, tmp_path: Path, layout: str) -> None:
    """The same adapter under each version's module paths, its explicit targets included."""
    ours = pair[1]
    wrapped = inject_lora(ours, LoRAConfig(rank=4, targets=("language.q_proj", "vision.fc1")))
    randomize(ours)
    expected = logits(ours)
    tensors = {}
    for key, parameter in trained_parameters(ours).items():
        tensors[f"base_model.model.{LAYOUTS[layout](key)}.weight"] = parameter.detach()
    remove_lora(ours)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": [LAYOUTS[layout](p) for p in wrapped]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert sorted(load_adapter(ours, tmp_path)) == sorted(wrapped)
    assert torch.equal(logits(ours), expected)


def test_layouts_are_those_of_the_versions() -> None:
    language, vision = "language_model.model.layers.0.mlp.up_proj", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    written, five, old = LAYOUTS.values()
    assert written(language) == five(language) == "model.language_model.layers.0.mlp.up_proj"
    assert written(vision) == "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    assert five(vision) == "model.vision_tower.encoder.layers.0.mlp.fc1"
    assert (old(language), old(vision)) == (language, vision)


def test_a_language_adapter_names_its_targets_by_one_expression(pair: Pair, tmp_path: Path) -> None:
    inject_lora(pair[1], LoRAConfig(rank=4))
    save_adapter(pair[1], tmp_path, base="google/paligemma-3b-pt-224", revision="bfloat16")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == r".*language_model.*\.(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)"
    assert (config["base_model_name_or_path"], config["revision"]) == ("google/paligemma-3b-pt-224", "bfloat16")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


Corrupt = Callable[[dict[str, Any], dict[str, Tensor]], None]
KEY = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"


def lose_a_tensor(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[KEY]


def lose_a_module(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[KEY], tensors[KEY.replace("lora_B", "lora_A")]


def add_a_tensor(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[KEY.replace("layers.1", "layers.7")] = torch.zeros(64, 4)


def add_vision(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight"] = torch.zeros(4, 24)


def another_rank(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["r"] = 8


def another_base(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = torch.zeros(96, 4)


def not_a_number(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[KEY][0, 0] = torch.nan


def dora(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["use_dora"] = True


def pissa(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["init_lora_weights"] = "pissa"


def prefix_tuning(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["peft_type"] = "PREFIX_TUNING"


def no_rank(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    del config["r"]


def bad_regex(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["target_modules"] = "("


def wrong_targets(config: dict[str, Any], _: dict[str, Tensor]) -> None:
    config["target_modules"] = ["q_proj"]


def whole_numbers(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY].int()


def setting(key: str, value: Any) -> Corrupt:
    return lambda config, _: config.update({key: value})


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lose_a_tensor, r"missing \(1\): language_model.model.layers.1.mlp.up_proj.lora_B"),
        (lose_a_module, r"missing \(2\): language_model.model.layers.1.mlp.up_proj.lora_A"),
        (add_a_tensor, r"unexpected \(1\): language_model.model.layers.7.mlp.up_proj.lora_B"),
        (add_vision, r"unexpected \(1\): vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A"),
        (another_rank, r"lora_A.weight \[4, 32\] instead of \[8, 32\]"),
        (another_base, r"up_proj.lora_B.weight \[96, 4\] instead of \[64, 4\]"),
        (not_a_number, r"not finite \(1\)"),
        (
            dora,
            r"not implemented here: {'use_dora': True}.*from_pretrained\(base, adapter\).merge_and_unload",
        ),
        (pissa, "not implemented here: {'init_lora_weights': 'pissa'}"),
        (prefix_tuning, "not implemented here: {'peft_type': 'PREFIX_TUNING'}"),
        (no_rank, "lacks r: not the configuration of an adapter"),
        (bad_regex, "holds a value that cannot be used"),
        (setting("target_modules", "a{99999999999}"), "holds a value that cannot be used: .*repetition number"),
        (whole_numbers, r"holds .*up_proj.lora_B.weight in torch.int32; expected one of F32, BF16, F16"),
        (setting("r", 4.5), "cannot be used: {'r': "),
        (setting("r", "4"), "cannot be used: {'r': "),
        (setting("lora_alpha", math.nan), "cannot be used: {'lora_alpha': "),
        (setting("lora_dropout", 1.0), "cannot be used: {'lora_dropout': "),
        (setting("use_rslora", "false"), "cannot be used: {'use_rslora': "),
        (setting("alpha_pattern", {"q_proj": "8"}), "cannot be used: {'alpha_pattern': "),
        (setting("alpha_pattern", {"(": 8}), "cannot be used: missing \\)"),
        (setting("modules_to_save", "norm"), "cannot be used: {'modules_to_save': "),
        (setting("modules_to_save", ["mlp"]), r"missing \(21\): .*language_model.model.layers.0.mlp.gate_proj.weight"),
        (setting("modules_to_save", ["vision_tower"]), r"not to be trained in full \(1\): .*position_embedding"),
        (setting("layers_to_transform", ["1"]), "cannot be used: {'layers_to_transform': "),
        (setting("layers_to_transform", -1), "cannot be used: {'layers_to_transform': "),
        (setting("layers_pattern", 3), "cannot be used: {'layers_pattern': "),
        (setting("trainable_token_indices", [1]), r"{'trainable_token_indices': \[1\]}.*merge_and_unload"),
        (setting("r", 10**12), "cannot be used: {'r': "),
        (setting("modules_to_save", ["embed_tokens"]), r"not to be trained in full \(1\): .*embed_tokens"),
        (setting("use_rsloar", True), "not implemented here: {'use_rsloar': True}"),
        (wrong_targets, "does not fit this model and its own adapter_config.json"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_the_model_left_alone(
    pair: Pair, tmp_path: Path, corrupt: Corrupt, message: str
) -> None:
    ours = pair[1]
    before = [(name, type(module)) for name, module in ours.named_modules()]
    inject_lora(ours, LoRAConfig(rank=4))
    save_adapter(ours, tmp_path)
    remove_lora(ours)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "manifest.json").unlink()
    corrupt(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_adapter(ours, tmp_path)
    assert [(name, type(module)) for name, module in ours.named_modules()] == before


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\x00" * 100, b"[1]", b"[" * 100_000, b"9" * 5000])
def test_missing_and_damaged_files_are_named(pair: Pair, tmp_path: Path, name: str, content: bytes | None) -> None:
    inject_lora(pair[1], LoRAConfig(rank=4))
    save_adapter(pair[1], tmp_path)
    remove_lora(pair[1])
    (tmp_path / name).unlink()
    (tmp_path / "manifest.json").unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_adapter(pair[1], tmp_path)


def test_values_that_are_not_finite_are_not_saved(pair: Pair, tmp_path: Path) -> None:
    inject_lora(pair[1], LoRAConfig(rank=4))
    with torch.no_grad():
        next(iter(trained_parameters(pair[1]).values()))[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not saved: 1 tensors"):
        save_adapter(pair[1], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_saving_and_loading_want_a_model_in_the_right_state(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(pair[1], tmp_path)
    inject_lora(pair[1], LoRAConfig(rank=4))
    save_adapter(pair[1], tmp_path)
    with pytest.raises(ValueError, match="remove_lora"):
        load_adapter(pair[1], tmp_path)


def test_how_an_adapter_was_trained_is_stored_with_it(pair: Pair, tmp_path: Path) -> None:
    facts = TrainingFacts(40, "accuracy", 36.7, 0.123, "answer en {question}", 12, None)
    inject_lora(pair[1], LoRAConfig(rank=4))
    save_adapter(pair[1], tmp_path / "told", facts=facts)
    save_adapter(pair[1], tmp_path / "untold")
    assert training_facts(tmp_path / "told") == facts
    assert training_facts(tmp_path / "untold") == TrainingFacts()
    with safe_open(tmp_path / "told/adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["training"])["metric_value"] == 36.7
    PeftModel.from_pretrained(pair[0], str(tmp_path / "told"))


def test_facts_of_a_later_version_are_ignored_and_wrong_types_are_not() -> None:
    assert TrainingFacts.from_json('{"step": 3, "of_a_later_version": [1]}') == TrainingFacts(step=3)
    for text in (
        '{"step": "3"}',
        '{"step": true}',
        '{"step": 3.0}',
        '{"max_new_tokens": -1.5}',
        '{"metric": 1}',
        '{"metric_value": NaN}',
        '{"validation_loss": Infinity}',
        '{"prompt": ["answer"]}',
        "[1]",
        "3",
        "{",
        "[" * 100_000,
    ):
        with pytest.raises(ValueError):  # noqa: PT011 (JSON's own, or ours that names the key)
            TrainingFacts.from_json(text)
    with pytest.raises(ValueError, match="validation_loss is nan; expected int or float, finite, or null"):
        TrainingFacts(validation_loss=float("nan"))


def test_facts_that_cannot_be_used_are_named_with_their_file(pair: Pair, tmp_path: Path) -> None:
    inject_lora(pair[1], LoRAConfig(rank=4))
    save_adapter(pair[1], tmp_path, facts=TrainingFacts(step=3))
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'step\\": 3', b'step\\": t'))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors says in its metadata, under 'training', what"):
        training_facts(tmp_path)


def test_twenty_steps_equal_peft_and_transformers(pair: Pair) -> None:
    """The same start, batches and optimizer: the same losses, and the same adapter weights afterwards."""
    library, ours = pair
    inject_lora(ours, LoRAConfig(rank=4, alpha=8))
    regex = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    theirs = get_peft_model(library, LoraConfig(r=4, lora_alpha=8, target_modules=regex))
    names = {
        name: f"base_model.model.{LAYOUTS['transformers 5'](name)}.default.weight" for name in trained_parameters(ours)
    }
    with torch.no_grad():
        for name, parameter in trained_parameters(ours).items():
            theirs.get_parameter(names[name]).copy_(parameter)
    assert len([key for key, _ in theirs.named_parameters() if "lora_" in key]) == len(names) == 2 * 21

    def steps(model: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
        start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        losses = []
        for step in range(20):
            loss = model.train()(**tiny.batch(tiny.CONFIG, [5, 9, 3], [2, 4, 1], seed=step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert not any(torch.equal(parameter, start[name]) for name, parameter in parameters.items())
        return {**parameters, "losses": torch.stack(losses)}

    rounding.assert_same(
        computed_by(ours, lambda model: steps(model, dict(trained_parameters(model)))),
        computed_by(
            theirs, lambda model: steps(model, {name: model.get_parameter(key) for name, key in names.items()})
        ),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text__hidden_size": 16, "hidden_size": 16, "projection_dim": 16, "vision__projection_dim": 16},
            "its language_model has hidden size 32, this one's has 16",
        ),
        ({"text__num_hidden_layers": 2}, "its language_model has 3 layers, this one's has 2"),
    ],
)
def test_a_base_of_another_size_is_told_by_its_size(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Not by a list of all tensors."""
    ours, other = (PaliGemma(PaliGemmaConfig.from_hf(hf)) for hf in (tiny.CONFIG, tiny.config(**changes)))
    inject_lora(ours, LoRAConfig(rank=2))
    save_adapter(ours, tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter was made for another base: {message}; give the base") as caught:
        load_adapter(other, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
