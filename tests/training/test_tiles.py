"""A step on images with tiles: the one made by hand, tile by tile, whatever is trained and however it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import PaliGemmaDataset, Processor, collate
from data.image_form import ImageForm
from finetune import LoRAConfig, inject_lora
from finetune.config.schema import TrainConfig
from finetune.lora.protocol import trained_parameters
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.objective import supervised
from model import ConnectorConfig, PaliGemma
from model.convert import changed, convert
from tests import rounding, tiny

LANGUAGE = LoRAConfig(rank=2, targets=("language.*",))
CONNECTOR = LoRAConfig(rank=2, targets=("language.*",), modules_to_save=("connector.*",))
EVERYWHERE = LoRAConfig(rank=2, targets=("language.*", "vision.*"), modules_to_save=("connector.*",))
CONNECTORS = {
    "linear": None,
    "dense_dci": ConnectorConfig("dense_dci"),
    "resampler": ConnectorConfig("resampler", latents=3, depth=1),
    "pixel_shuffle": ConnectorConfig("pixel_shuffle"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))


def tiled_model(base: Path, lora: LoRAConfig, connector: str, dtype: torch.dtype = torch.float64) -> PaliGemma:
    """With four tiles, what is trained off its start."""
    model = PaliGemma.from_pretrained(base, dtype=torch.float32)
    convert(model, changed(model.config, CONNECTORS[connector], tiles=4))
    inject_lora(model, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return rounding.in_dtype(model, dtype).train()


def examples_of(model: PaliGemma) -> list[dict[str, Any]]:
    """Seven questions of different lengths on three images."""
    config, generator = model.config, torch.Generator().manual_seed(2)
    pixels = [torch.rand(config.pixel_shape, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(3)]
    made = []
    for index in range(7):
        text = torch.randint(3, config.image_token_id, (3 + index % 4 + 2,), generator=generator)
        ids = torch.cat((torch.full((config.num_image_tokens,), config.image_token_id), text))
        answer = torch.arange(len(ids)) >= len(ids) - 2
        row = {"input_ids": ids, "token_type_ids": answer.long(), "labels": ids.where(answer, -100)}
        made.append({**row, "pixel_values": pixels[index % 3], "id": str(index), "image_id": str(index % 3)})
    return made


def accumulated(
    model: PaliGemma, examples: Sequence[dict[str, Any]], micro_batch: int
) -> tuple[float, dict[str, Tensor]]:
    """Loss, a sum in fp32, and gradients of the step as the trainer takes it."""
    train = TrainConfig(max_steps=1, batch_size=len(examples), seed=3)
    trained = trained_parameters(model)
    plan = ExecutionPlan(micro_batch)
    step = GradientAccumulation(model, trained, train, plan, lambda rows: collate(rows, model.config.pad_token_id))
    loss = step.accumulate(list(examples), supervised(examples), step=0)
    return float(loss), {name: p.grad for name, p in trained.items() if p.grad is not None}


def by_hand(model: PaliGemma, examples: Sequence[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
    """Each view through tower and connector by itself, its tokens side by side, and the loss in plain PyTorch."""
    total = torch.zeros((), dtype=torch.float64)
    trained = trained_parameters(model)
    for example in examples:
        tokens = []
        for view in example["pixel_values"]:  # [3, H, W]
            features, means = model.vision_tower(view[None], model.multi_modal_projector.groups)
            tokens.append(model.multi_modal_projector(features, *means)[0])
        ids, types = example["input_ids"][None], example["token_type_ids"][None]
        logits = model(ids, token_type_ids=types, image_features=torch.cat(tokens)[None]).logits[0]
        total = total + F.cross_entropy(logits[:-1], example["labels"][1:], ignore_index=-100, reduction="sum")
    loss = total / supervised(examples)
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return float(loss.detach()), {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7])
@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("lora", [LANGUAGE, CONNECTOR, EVERYWHERE], ids=["language", "connector", "everywhere"])
def test_a_step_with_tiles_is_the_one_made_by_hand(
    base: Path, lora: LoRAConfig, connector: str, micro_batch: int
) -> None:
    with rounding.KeepFP64():
        model = tiled_model(base, lora, connector)
        examples = examples_of(model)
        expected_loss, expected = by_hand(model, examples)
        loss, found = accumulated(model, examples, micro_batch)
    assert len(found) == len(trained_parameters(model))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    rounding.assert_exact(found, expected)


@pytest.mark.parametrize("targets", [("language.*", "connector.*"), ("language.*", "vision.*", "connector.*")])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_dropout_of_tiles_depends_on_the_image_and_not_on_the_cut(
    base: Path, connector: str, targets: tuple[str, ...]
) -> None:
    lora = LoRAConfig(rank=2, targets=targets, dropout=0.3)
    with rounding.KeepFP64():
        models = [tiled_model(base, lora, connector) for _ in range(3)]
        examples = examples_of(models[0])
        loss, whole = accumulated(models[0], examples, 7)
        cut_loss, cut = accumulated(models[1], examples, 2)
        without, _ = accumulated(models[2].eval(), examples, 7)
    rounding.assert_exact(cut, whole)
    assert cut_loss == pytest.approx(loss, rel=1e-6)
    assert abs(without - loss) > 1e-3


def test_no_two_tiles_lose_the_same_to_dropout(base: Path) -> None:
    """Five tiles that are one and the same image come out of the vision tower different from each other."""
    model = tiled_model(base, LoRAConfig(rank=2, targets=("vision.*",), dropout=0.3), "linear")
    examples = examples_of(model)[:1]
    examples[0]["pixel_values"] = examples[0]["pixel_values"][:1].expand(5, -1, -1, -1)
    found: list[Tensor] = []
    model.vision_tower.register_forward_hook(lambda _, __, output: found.append(output[0].detach()))
    with rounding.KeepFP64():
        accumulated(model, examples, 1)
    views = found[0]  # (5, N, D)
    assert all(not torch.equal(views[i], views[j]) for i in range(5) for j in range(i))


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("lora", [LANGUAGE, CONNECTOR], ids=["language", "connector"])
def test_each_image_is_encoded_once_a_step_with_its_tiles(base: Path, lora: LoRAConfig, connector: str) -> None:
    """Also where what comes behind the vision tower is trained."""
    model = tiled_model(base, lora, connector)
    sizes: list[int] = []
    model.vision_tower.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    with rounding.KeepFP64():
        accumulated(model, examples_of(model), 2)
    assert sizes == [2 * 5, 1 * 5]


def test_examples_of_a_data_set_have_tiles(tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / "assets/tiny-base"
    whole = Processor.from_pretrained(base)
    form = ImageForm(whole.image_form.size, 4, "squash", 5 * whole.num_image_tokens)
    processor = Processor.from_pretrained(base, image_form=form)
    path = tmp_path / "a.png"
    Image.effect_noise((67, 31), 50).convert("RGB").save(path)
    record = {"id": "q", "image": str(path), "image_id": "i", "prefix": "caption en", "answers": ["a"], "answer": "a"}
    example = PaliGemmaDataset([record], processor)[0]
    size = form.size
    assert example["pixel_values"].shape == (5, 3, size, size)
    assert torch.equal(example["pixel_values"], processor.pixels(path))
    batch = collate([example, example], processor.pad_id)
    assert batch["pixel_values"].shape == (2, 5, 3, size, size)
    assert batch["input_ids"].shape[1] - len(whole.encode("caption en", "a")["input_ids"]) == 4 * whole.num_image_tokens
