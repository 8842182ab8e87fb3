"""Whether a few examples can be learned is found out, and nothing of it is saved."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import train
from data import collate
from finetune import LoRAConfig
from finetune.config.schema import RunConfig
from finetune.preflight.overfit import Overfit, overfit_config, train_until_learned
from finetune.preflight.probe import RandomExamples, StepWorkload
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.trainer import LoRATrainer
from tests.preflight.small_run import arguments, network, run_config


def test_examples_are_learned_and_nothing_is_saved(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*arguments(scenes, tmp_path / "run"), "--overfit", "8"])
    out = " ".join(capsys.readouterr().out.split())
    found = re.search(r"it learns: 8 of 8 answered as expected after (\d+) steps, loss (\S+) -> (\S+)", out)
    assert found is not None, out
    assert int(found[1]) < 100  # it stopped as soon as it could
    assert float(found[3]) < 0.5 * float(found[2])
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_learn_is_said_not_to(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a hundred steps, of which none writes a checkpoint; with question, expected and given answer."""
    saved: list[Any] = []
    monkeypatch.setattr(LoRATrainer, "_save_checkpoint", lambda *given: saved.append(given))
    argv = [*arguments(scenes, tmp_path / "run", "train.learning_rate=1e-9", "train.save_every=10"), "--overfit", "3"]
    with pytest.raises(
        ValueError, match=r"the examples were not learned: 0 of 3 .* after 100 steps, .*learning_rate \(1e-09\)"
    ):
        train.main(argv)
    assert saved == []
    assert list(tmp_path.iterdir()) == []
    questions = json.loads((scenes / "v2_OpenEnded_mscoco_train2014_questions.json").read_text())["questions"]
    out = capsys.readouterr().out
    assert all(question["question"] in out for question in questions[:3])


@pytest.mark.parametrize("count", ["0", "-1", "100000"])
def test_more_examples_than_there_are_cannot_be_learned(scenes: Path, tmp_path: Path, count: str) -> None:
    with pytest.raises(ValueError, match=rf"--overfit {count}: expected 1 to \d\d\d, the examples of data.train"):
        train.main([*arguments(scenes, tmp_path), "--overfit", count])


def test_a_loss_that_still_falls_asks_for_a_larger_learning_rate() -> None:
    falling = [2.0 - step / 100 for step in range(100)]
    assert Overfit(falling, []).still_falls
    assert not Overfit([*falling[:50], *[1.5] * 50], []).still_falls
    assert not Overfit([1.0, 0.5], []).still_falls  # too few steps to say so


def test_what_was_known_before_is_not_learned() -> None:
    right, wrong = ("is it red?", "yes", "yes"), ("is it red?", "yes", "no")
    assert Overfit([2.0, 0.1], [right, right]).learned
    assert not Overfit([2.0, 0.1], [right, wrong]).learned
    assert not Overfit([0.1, 0.09], [right, right]).learned


def test_it_differs_from_the_run_in_size_and_schedule(tmp_path: Path) -> None:
    run = run_config(("language.*",), 16, tmp_path)
    run = run.model_copy(update={"lora": LoRAConfig(rank=4, dropout=0.5)})
    found = overfit_config(run, 6)
    assert found.lora == LoRAConfig(rank=4)
    assert (found.train.batch_size, found.train.micro_batch, found.train.max_steps) == (6, 6, 100)
    assert (found.train.schedule, found.train.warmup, found.data.answers) == ("constant", 0.05, "majority")
    assert overfit_config(run, 32).train.micro_batch == 16
    assert found.train.learning_rate == run.train.learning_rate
    assert RunConfig.model_validate(found.model_dump()) == found  # what is copied is not checked: this is


def learned(tmp_path: Path, execution: ExecutionPlan, ask: Any) -> Overfit:
    """Training on four random examples until they are learned."""
    run = overfit_config(run_config(("language.*",), 4, tmp_path), 4)
    model = network(run)
    made = RandomExamples(model.config, StepWorkload(4, 4.0, 24, 2), 4)

    class Pairs(RandomExamples):
        def __getitem__(self, pair: Any) -> Any:
            return made[pair[0]]

    return train_until_learned(
        run, model, Pairs(model.config, made.workload, 4), execution, partial(collate, pad_id=0), ask
    )


def test_the_network_answers_every_five_steps_while_all_of_it_is_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the vision tower leaves the device; the first right answers with a lower loss end the training."""
    inside, asked = 0, []
    on_device = GradientAccumulation.vision_on_device

    @contextlib.contextmanager
    def noted(accumulation: GradientAccumulation) -> Iterator[None]:
        nonlocal inside
        with on_device(accumulation):
            inside += 1
            yield
            inside -= 1

    def ask() -> list[tuple[str, str, str]]:
        asked.append(inside)
        return [("?", "yes", "yes" if len(asked) >= 3 else "no")] * 4

    monkeypatch.setattr(GradientAccumulation, "vision_on_device", noted)
    monkeypatch.setattr(Overfit, "learned", property(lambda found: found.right == 4))
    found = learned(tmp_path, ExecutionPlan(2, offload_vision=True), ask)
    assert asked == [1, 1, 1]
    assert len(found.losses) == 15
    assert found.right == 4


def test_an_infinite_loss_names_the_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise FloatingPointError("step 1: the loss is inf")

    monkeypatch.setattr(LoRATrainer, "training_step", broken)
    with pytest.raises(ValueError, match=r"lower train\.learning_rate \(0\.0001\); step 1: the loss is inf"):
        learned(tmp_path, ExecutionPlan(4), list)
