"""Steps of rows with images and rows of text alone: each row counts as it would by itself."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import evaluate
import train
from data import collate
from finetune.lora.protocol import trained_parameters
from finetune.system.workers import Batch
from finetune.training.gradient_accumulation import fill_gradients
from finetune.training.objective import supervised
from finetune.training.step_inputs import has_image, micro_batches
from finetune.training.trainer import LoRATrainer
from tests import rounding, tiny
from tests.test_scripts import base_with_scenes, files, overrides
from tests.training.test_trainer import Examples, first_step, gradients_of, off_its_start, run_config, trainer_of

IMAGE_TOKENS = 4
EVERYWHERE = {"targets": ["language.*", "vision.*"], "rank": 4, "modules_to_save": ["connector.linear"]}
BEFORE_DECODER = ("vision_tower", "multi_modal_projector")


class Mixed(Examples):
    """Every `every`-th one is text alone."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.examples = [text(one) if i % every == 0 else one for i, one in enumerate(self.examples)]


def text(example: dict[str, Any]) -> dict[str, Any]:
    """The example without its image and the tokens of it."""
    texts = {name: value[IMAGE_TOKENS:] for name, value in example.items() if name in ("input_ids", "token_type_ids")}
    return {**texts, "labels": example["labels"][IMAGE_TOKENS:], "id": example["id"], "image_id": f"of {example['id']}"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_library_model(tiny.library_model(tiny.CONFIG), tmp_path_factory.mktemp("tiny"))


def mixed_trainer(base: Path, output: Path, lora: dict[str, Any] | None, every: int, **settings: Any) -> LoRATrainer:
    dtype = settings.pop("dtype", torch.float32)
    trainer = trainer_of(run_config(base, output, lora, **settings), dtype)
    trainer.train_dataset = Mixed(every)
    return off_its_start(trainer)


@pytest.mark.parametrize("targets", [["language.*"], ["language.*", "vision.*"]], ids=["frozen tower", "trained tower"])
@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_the_gradient_of_a_step_of_both_kinds_is_the_sum_over_its_rows(
    base: Path, tmp_path: Path, targets: list[str], micro_batch: int
) -> None:
    lora = {**EVERYWHERE, "targets": targets}
    with rounding.KeepFP64():
        found = gradients_of(mixed_trainer(base, tmp_path, lora, 3, micro_batch=micro_batch, dtype=torch.float64))
        trainer = mixed_trainer(base, tmp_path, lora, 3, dtype=torch.float64)
        examples = first_step(trainer)
        assert len(set(map(has_image, examples))) == 2
        for example in examples:
            trainer.network(**collate([example], 0), num_items_in_batch=supervised(examples)).loss.backward()
    trained = trained_parameters(trainer.network).items()
    rounding.assert_exact(found, {name: p.grad for name, p in trained if p.grad is not None})


def test_no_micro_batch_has_both_kinds_and_rows_with_images_come_first() -> None:
    examples = Mixed(3).examples
    cut = list(micro_batches(examples, 8))
    kinds = [{has_image(example) for example in micro_batch} for micro_batch in cut]
    assert kinds == [{True}] * 4 + [{False}] * 2  # of 26 and 14
    assert {str(example["id"]) for one in cut for example in one} == {str(example["id"]) for example in examples}
    longest = [max(len(example["input_ids"]) for example in one) for one in cut if not has_image(one[0])]
    assert longest == sorted(longest, reverse=True)


def test_a_step_of_text_alone_gives_zeros_before_the_decoder(base: Path, tmp_path: Path) -> None:
    trainer = mixed_trainer(base, tmp_path, EVERYWHERE, 1)
    found = gradients_of(trainer)
    assert found.keys() == trained_parameters(trainer.network).keys()
    moved = {name.startswith(BEFORE_DECODER): set[bool]() for name in found}
    for name, gradient in found.items():
        moved[name.startswith(BEFORE_DECODER)].add(bool(gradient.any()))
    assert moved == {True: {False}, False: {True}}
    assert trainer.awaits_image


def test_a_run_of_text_alone_trains_the_decoder_and_leaves_the_rest(base: Path, tmp_path: Path) -> None:
    trainer = mixed_trainer(base, tmp_path, None, 1, max_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in trainer.network.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.network.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if name.startswith("language_model")}


def test_what_is_disconnected_before_the_decoder_is_found_in_the_first_step_with_an_image(
    base: Path, tmp_path: Path
) -> None:
    trainer = mixed_trainer(base, tmp_path, EVERYWHERE, 2)
    adapter = trainer.network.get_submodule("vision_tower.vision_model.encoder.layers.1.mlp.fc1")
    adapter.forward = lambda x: torch.nn.functional.linear(x, adapter.weight, adapter.bias)  # type: ignore[arg-type]
    examples = first_step(trainer)
    of_text = [example for example in examples if not has_image(example)]
    trainer._initial_global_step = 0
    trainer.training_step(trainer.network, of_text)
    trainer.network.zero_grad()
    trainer.state.global_step = 1
    with pytest.raises(RuntimeError, match=r"2 trained parameters got no gradient.*layers\.1\.mlp\.fc1\.lora_A"):
        trainer.training_step(trainer.network, examples)


def test_zeros_are_filled_in_where_there_is_no_gradient_and_something_is_trained() -> None:
    linear, frozen = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)
    linear.weight.grad = torch.ones(2, 2)
    fill_gradients(linear, frozen)
    assert linear.weight.grad.sum() == 4
    assert linear.bias.grad is not None
    assert not linear.bias.grad.any()
    assert frozen.weight.grad is None


def test_a_frozen_tower_is_not_moved_for_rows_of_text(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = mixed_trainer(base, tmp_path, {**EVERYWHERE, "targets": ["language.*"], "modules_to_save": []}, 1)
    monkeypatch.setattr(trainer.accumulation, "vision_on_device", lambda: pytest.fail("it is moved"))
    found: dict[str, Tensor] = gradients_of(trainer)
    assert found


def test_batches_of_both_kinds_come_from_a_worker_as_they_were_made() -> None:
    made = Mixed(2).examples[:6]
    sent = pickle.loads(pickle.dumps(Batch(made)))
    assert [set(example) for example in sent] == [set(example) for example in made]
    for example, expected in zip(sent, made, strict=True):
        for name in ("input_ids", "labels", "pixel_values")[: 2 + has_image(expected)]:
            assert torch.equal(example[name], torch.as_tensor(expected[name]))


def test_a_run_on_images_and_texts_from_its_start_to_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained in both kinds, evaluated on both, each by itself; the page shows a text without an image."""
    base = base_with_scenes(tmp_path / "base")
    rows = [{"prefix": f"answer en {i} and {i}", "suffix": [f"{2 * i}", "even"]} for i in range(7)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts: dict[str, Any] = {"jsonl": str(tmp_path / "texts.jsonl"), "text_rows": True}
    scenes = {split: files(base, split) | {"name": "scenes"} for split in ("train2014", "val2014")}
    data = {
        "train": [scenes["train2014"] | {"weight": 1}, texts | {"weight": 1}],
        "validation": [scenes["val2014"] | {"count": 5}, texts],
        "answers": "all",
        "workers": 1,
    }
    lora = "lora={rank: 2, targets: [language.down_proj, vision.fc2]}"
    words = ["configs/quickstart.yaml", *overrides(base, tmp_path / "run", f"data={json.dumps(data)}", lora)]
    train.main([*words, "--dry-run"])
    said = capsys.readouterr().out
    assert "data.train: 7 of " in said
    assert " records are text without an image (text_rows)" in said
    assert re.search(r"rows of \d+ tokens, answers of \d+ \(the longest of the data, taken to have an image\)", said)
    assert re.search(r"TFLOP an example in rows of (\d+) tokens, (\d+) without an image, answers of", said)
    train.main([*words, "train.max_steps=2"])
    evaluate.main([*words, "train.max_steps=2", "--arm", "adapter"])
    metrics = json.loads((tmp_path / "run/eval/adapter/metrics.json").read_text())
    assert {name: of["questions"] for name, of in metrics["by_source"].items()} == {"scenes": 5, "texts": 7}
    assert metrics["by_source"]["texts"]["images"] == 0
    answers = [json.loads(line) for line in (tmp_path / "run/eval/adapter/answers.jsonl").read_text().splitlines()]
    assert [answer["question"] for answer in answers[5:]] == [row["prefix"] for row in rows]
    page = (tmp_path / "run/report.html").read_text()
    assert '<div class="card"><div class="question"' in page
    assert "answer en 3 and 3" in page
