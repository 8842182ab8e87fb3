"""A step on all answers of each question is what the answers are in rows of their own, weighted by their shares."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train
from data import PaliGemmaDataset, Processor, collate
from data.dataset import Answers
from data.lengths import Longest, measure
from data.records import load_records
from data.synthetic import scenes
from finetune import LoRAConfig, inject_lora, run
from finetune.adapters.metadata import training_facts
from finetune.config.schema import DataConfig, TrainConfig
from finetune.lora.protocol import trained_parameters
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.objective import supervised
from model import PaliGemma
from model.random_init import from_random
from tests import kill_test, rounding

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets/tiny-base"
WORDS = ["3", "three", "3 circles", "a circle", "red", "yes", "a red circle and a blue cross"]
Example = dict[str, Any]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Five questions on two images, each with the answers of eight annotators, who disagree more or less: their shares
    are exact in fp32.
    """
    folder, draw, rows = tmp_path_factory.mktemp("images"), random.Random(0), []
    for number in range(5):
        path = folder / f"{number % 2}.png"
        Image.fromarray(np.full((8, 8, 3), 90 * (number % 2), np.uint8)).save(path)
        answers = draw.choices(WORDS[: 1 + 2 * number], k=8)
        texts = {"question": "", "prefix": "answer en how many?" + " really?" * number, "answers": answers}
        rows.append({"id": f"q{number}", "image": str(path), "image_id": f"i{number % 2}", "answer": "3", **texts})
    return rows


def network() -> PaliGemma:
    """The tiny base with random weights, in fp64, adapters off their start."""
    model = from_random(BASE, 0)
    inject_lora(model, LoRAConfig(rank=2, targets=("language.q_proj", "language.down_proj", "connector.linear")))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return rounding.in_dtype(model, torch.float64).train()


def accumulated(
    model: PaliGemma, steps: Sequence[Sequence[Example]], tokens: float, plan: ExecutionPlan
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of examples, step by step, all divided by `tokens`."""
    model.zero_grad()
    trained, config = trained_parameters(model), TrainConfig(max_steps=1, batch_size=5, seed=3)
    made = GradientAccumulation(model, trained, config, plan, partial(collate, pad_id=model.config.pad_token_id))
    loss = sum(float(made.accumulate(list(examples), tokens, step=0)) for examples in steps)
    return loss, {name: p.grad for name, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("plan", [ExecutionPlan(5), ExecutionPlan(2), ExecutionPlan(1, recompute_layers=2)], ids=str)
def test_a_step_is_that_of_each_record_once_with_each_of_its_annotators(
    records: list[dict[str, Any]], plan: ExecutionPlan
) -> None:
    """Eight epochs of rotate on the same network, in rows of one answer: their loss and gradient, however it is cut."""
    processor, epochs = Processor.from_pretrained(BASE), range(8)
    rotating, every = PaliGemmaDataset(records, processor), PaliGemmaDataset(records, processor, "all")
    separate = [[rotating[index, epoch] for index in range(5)] for epoch in epochs]
    together = [every[index, 0] for index in range(5)]
    assert [int(row["token_type_ids"].max()) for row in together] == [len(set(row["answers"])) for row in records]
    tokens = sum(map(supervised, separate))
    assert supervised(together) == tokens / 8
    model = network()
    with rounding.KeepFP64():
        expected_loss, expected = accumulated(model, separate, tokens, ExecutionPlan(5))
        loss, found = accumulated(model, [together], tokens / 8, plan)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == trained_parameters(model).keys()
    rounding.assert_exact(found, expected)


def test_the_gradient_is_the_weighted_mean_over_separate_rows(records: list[dict[str, Any]]) -> None:
    """And the shards of two processes add up to it."""
    processor, model = Processor.from_pretrained(BASE), network()
    together = [PaliGemmaDataset(records, processor, "all")[index] for index in range(5)]
    tokens = supervised(together)
    single = [of_one(example, number) for example in together for number in range(1, 1 + suffixes_of(example))]
    assert len(single) > 5
    assert supervised(single) == tokens
    with rounding.KeepFP64():
        _, whole = accumulated(model, [together], tokens, ExecutionPlan(3))
        _, apart = accumulated(model, [single], tokens, ExecutionPlan(4))
        _, shards = accumulated(model, [together[::2], together[1::2]], tokens, ExecutionPlan(3))
    rounding.assert_exact(whole, apart)
    rounding.assert_exact(whole, shards)


def suffixes_of(example: Example) -> int:
    return int(example["token_type_ids"].max())


def of_one(example: Example, number: int) -> Example:
    """The example with this suffix alone, of the same weight."""
    types = example["token_type_ids"]
    kept = (types == 0) | (types == number)
    texts = {name: example[name][kept] for name in ("input_ids", "labels", "loss_weights")}
    return {**example, **texts, "token_type_ids": types[kept].clamp(max=1)}


def test_rows_without_weights_count_once_in_a_step_with_others(records: list[dict[str, Any]]) -> None:
    """As from a source of one answer each beside one of several."""
    processor, model = Processor.from_pretrained(BASE), network()
    weighted = [PaliGemmaDataset(records, processor, "all")[index] for index in (3, 4)]
    plain = [PaliGemmaDataset(records, processor, "majority")[index] for index in (0, 1)]
    ones = [{**example, "loss_weights": (example["labels"] != -100).float()} for example in plain]
    tokens = supervised([*weighted, *plain])
    assert tokens == supervised(weighted) + sum(int((example["labels"] != -100).sum()) for example in plain)
    with rounding.KeepFP64():
        _, mixed = accumulated(model, [[*weighted, *plain]], tokens, ExecutionPlan(4))
        _, cut = accumulated(model, [[*weighted, *plain]], tokens, ExecutionPlan(1))
        _, all_weighted = accumulated(model, [[*weighted, *ones]], tokens, ExecutionPlan(4))
    rounding.assert_exact(mixed, all_weighted)
    rounding.assert_exact(cut, all_weighted)


def test_a_configuration_takes_what_the_data_set_does() -> None:
    """But for pairs and prompts, which are those of objectives."""
    assert (*get_args(DataConfig.model_fields["answers"].annotation), "pair", "prompt") == get_args(Answers)


def test_a_run_learns_all_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From configuration to result: inspected, planned for the rows that it has, and stored as of one answer."""
    scenes.write(tmp_path / "data", scenes=6, seed=1, split="train2014")
    source = {
        "questions": tmp_path / "data/v2_OpenEnded_mscoco_train2014_questions.json",
        "annotations": tmp_path / "data/v2_mscoco_train2014_annotations.json",
        "images": tmp_path / "data/images",
    }
    planned_for: list[Longest] = []

    def noting(*given: Any) -> Any:
        planned_for.append(given[-1])
        return kill_test.unplanned(*given)

    monkeypatch.setattr(run, "plan_run", noting)
    words = [
        str(ROOT / "configs/quickstart.yaml"),
        f"model={{path: {BASE}, dtype: float32, device: cpu}}",
        f"data={{train: {json.dumps(source, default=str)}, answers: all, workers: 0}}",
        "train={max_steps: 3, batch_size: 6, micro_batch: 4, learning_rate: 1e-2, log_every: 1}",
        f"output={tmp_path / 'run'}",
    ]
    train.main([*words, "--inspect"])
    said = " ".join(capsys.readouterr().out.split())
    assert " | " in said
    assert "no answer leaks into what comes before it" in said
    train.main(words)
    files = (source["questions"], source["annotations"], source["images"])
    records = load_records(questions=files[0], annotations=files[1], images=files[2])
    lengths = measure(records, Processor.from_pretrained(BASE), "all")
    assert planned_for == [lengths.longest]
    assert lengths.longest.supervised > lengths.longest_answer
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    facts = training_facts(tmp_path / "run/adapter")
    assert (facts.max_new_tokens, facts.max_text_tokens) == (lengths.longest_answer, lengths.longest_text)
