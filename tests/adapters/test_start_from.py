"""A run that starts from an adapter: its shape, its values, and what contradicts it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import train
from data.synthetic import scenes
from finetune import LoRAConfig, inject_lora, save_adapter
from finetune.adapters.start_from import settings_of, start
from finetune.config.load import ConfigError, load_config
from finetune.lora.protocol import trained_parameters
from model import PaliGemma
from tests import kill_test, tiny
from tests.kill_test import ROOT

SHAPES = {
    "patterns": LoRAConfig(
        rank=3,
        alpha=6.0,
        targets=("language.q_proj", "language.2.*", "vision.1.fc1"),
        rank_pattern={"language.0.q_proj": 5},
        alpha_pattern={"language.2.up_proj": 4.0},
        dropout=0.25,
        rslora=True,
        modules_to_save=("connector.linear",),
    ),
    "plain": LoRAConfig(rank=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))


def network(base: Path) -> PaliGemma:
    return PaliGemma.from_pretrained(base, dtype=torch.float32)


def saved(base: Path, directory: Path, lora: LoRAConfig) -> dict[str, torch.Tensor]:
    """An adapter off its start, on disk; its values."""
    model = network(base)
    inject_lora(model, lora)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    save_adapter(model, directory)
    return {name: parameter.detach() for name, parameter in trained_parameters(model).items()}


def configuration(directory: Path, lora: dict[str, Any]) -> LoRAConfig:
    """The section as a run's file and its overrides give it."""
    file = directory / "run.yaml"
    run = {"model": {"path": "x"}, "data": {"train": {"jsonl": "x"}}, "train": {"epochs": 1}, "output": "x"}
    file.write_text(json.dumps(run | {"lora": lora}))
    found = load_config(file).lora
    assert found is not None
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_shape_and_values_are_the_adapters(base: Path, tmp_path: Path, name: str) -> None:
    values = saved(base, tmp_path / "adapter", SHAPES[name])
    expected = network(base)
    inject_lora(expected, SHAPES[name])
    config = configuration(tmp_path, {"start_from": str(tmp_path / "adapter")})
    model = network(base)
    start(model, config, seed=3)
    assert settings_of(model) == settings_of(expected)
    assert config.dropout == SHAPES[name].dropout
    trained = {id(parameter) for parameter in trained_parameters(model).values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained
    assert trained_parameters(model).keys() == values.keys()
    for key, parameter in trained_parameters(model).items():
        assert torch.equal(parameter, values[key]), key
    fresh = network(base)
    start(fresh, dataclasses.replace(config, start_from=None), seed=3)  # as the plan makes it
    assert settings_of(fresh) == settings_of(expected)


def test_an_adapter_of_pefts_is_started_from_and_a_run_stands_for_its_adapter(base: Path, tmp_path: Path) -> None:
    library = tiny.library_model(tiny.CONFIG)
    theirs = get_peft_model(library, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], lora_dropout=0.5))
    theirs.save_pretrained(str(tmp_path / "run/adapter"))
    config = configuration(tmp_path, {"start_from": str(tmp_path / "run"), "dropout": 0.0})
    assert (config.rank, config.alpha, config.dropout) == (2, 8.0, 0.0)
    model = network(base)
    start(model, config, seed=0)
    stored = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    ours = trained_parameters(model)
    assert len(ours) == len(stored) == 2 * 6  # in both towers
    assert {tensor.sum().item() for tensor in ours.values()} == {tensor.sum().item() for tensor in stored.values()}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"rank": 8}, r"lora\.rank at language_model\.\S+\.down_proj: 8, in the adapter 4\n"),
        ({"alpha": 32.0}, r"lora\.alpha at \S+: 32\.0, in the adapter 16\.0\n.*\n.*\n  and 18 more"),
        ({"rslora": True}, r"lora\.rslora at \S+: True, in the adapter False"),
        ({"targets": ["language.q_proj"]}, r"lora\.targets at \S+: not, in the adapter adapted"),
        (
            {"targets": ["language.*", "vision.fc1"]},
            r"lora\.targets at vision_\S+fc1: adapted, in the adapter not",
        ),
        ({"modules_to_save": ["connector.linear"]}, r"lora\.modules_to_save at multi_\S+: trained, in the adapter not"),
        ({"rank_pattern": {"language.0.q_proj": 5}}, r"lora\.rank at \S+0\.self_attn\.q_proj: 5, in the adapter 4"),
    ],
)
def test_what_contradicts_the_adapter_is_named(base: Path, tmp_path: Path, given: dict[str, Any], named: str) -> None:
    saved(base, tmp_path / "adapter", SHAPES["plain"])
    config = configuration(tmp_path, {"start_from": str(tmp_path / "adapter"), **given})
    with pytest.raises(ValueError, match=r"(?s)contradicts the adapter in \S+, which lora\.start_from names.*" + named):
        start(network(base), config, seed=0)


def dry_run(base: Path, directory: Path, lora: dict[str, Any]) -> None:
    """Of a run from `base`, of which the configuration and the tokenizer are there, and no weights."""
    if not (directory / "base").exists():
        shutil.copytree(ROOT / "assets/tiny-base", directory / "base")
        (directory / "base/model.safetensors").unlink()
        shutil.copy(base / "config.json", directory / "base")
    settings = [f"model={{path: {directory}/base, dtype: float32, device: cpu}}", f"output={directory}/run"]
    train.main([str(ROOT / "configs/quickstart.yaml"), *settings, f"lora={json.dumps(lora)}", "--dry-run"])


def test_a_dry_run_finds_what_contradicts_the_adapter(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the base's weights."""
    saved(base, tmp_path / "adapter", SHAPES["patterns"])
    start_from = {"start_from": str(tmp_path / "adapter")}
    dry_run(base, tmp_path, start_from)
    dry_run(base, tmp_path, {**start_from, "dropout": 0.5})
    assert capsys.readouterr().out.count("it fits") == 2
    with pytest.raises(
        ValueError, match=r"(?s)contradicts the adapter in \S+, which .*alpha at \S+: 7\.0, in the adap"
    ):
        dry_run(base, tmp_path, {**start_from, "alpha": 7.0})
    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)  # it goes on from there, not from the adapter
    dry_run(base, tmp_path, {**start_from, "alpha": 7.0})


def test_a_dry_run_finds_an_adapter_of_another_size(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", SHAPES["plain"])
    changes = {"text__num_hidden_layers": 2}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(tiny.config(**changes)))
    with pytest.raises(
        ValueError, match="was made for another base: its language_model has 3 layers, this one's has 2"
    ):
        dry_run(tmp_path / "other", tmp_path, {"start_from": str(tmp_path / "adapter")})


def test_no_adapter_and_that_of_another_base_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml:\d+: lora\.start_from: .* holds no adapter_config\.json"):
        configuration(tmp_path, {"start_from": str(tmp_path / "nowhere")})
    saved(base, tmp_path / "adapter", SHAPES["plain"])
    other = network(base)
    with torch.no_grad():
        other.get_parameter("language_model.model.layers.0.mlp.up_proj.weight").add_(1.0)
    config = configuration(tmp_path, {"start_from": str(tmp_path / "adapter")})
    with pytest.raises(ValueError, match="was trained on another base"):
        start(other, config, seed=0)


def test_a_run_continues_where_another_runs_adapter_ended(tmp_path: Path) -> None:
    """And says all of its shape in its own config.yaml, with which it is resumed without that adapter."""
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(tmp_path / "data", scenes=8, seed=seed, split=split)

    def run(output: Path, *more: str) -> None:
        changes = [c for c in kill_test.overrides(tmp_path, output) if not (more and c.startswith("lora="))]
        train.main([str(ROOT / "configs/quickstart.yaml"), *changes, *more])

    run(tmp_path / "first", "lora={rank: 2, targets: [language.*]}")
    second = [f"lora={{start_from: {tmp_path}/first}}", "train.learning_rate=1e-9"]
    run(tmp_path / "second", *second)
    before, after = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("first", "second"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # at this rate nothing moves
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)
    lora = load_config(tmp_path / "second/config.yaml").lora
    assert lora is not None
    assert (lora.rank, lora.start_from) == (2, f"{tmp_path}/first")
    with pytest.raises(ValueError, match=r"another result(?s:.*)lora\.start_from: was .*first, is None"):
        run(tmp_path / "second", "lora={rank: 2, targets: [language.*]}", "train.learning_rate=1e-9")
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "second/checkpoints/step-000006")
    train.main([str(tmp_path / "second/config.yaml")])
    again = load_file(tmp_path / "second/adapter/adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())
