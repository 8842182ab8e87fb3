"""Runs with train.objective=reward: what they say, keep and refuse, and that a kill changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from data.lengths import Longest
from data.synthetic import scenes
from finetune import run
from finetune.config.load import load_config
from finetune.evaluation.run import worth_of
from finetune.preflight.run_plan import assumed_lengths, plan_run
from finetune.training.gradient_accumulation import GradientAccumulation
from model import PaliGemmaConfig
from tests import kill_test

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets/tiny-base"


@pytest.fixture(scope="module")
def scene_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captions, which the base was trained on, and questions."""
    folder = tmp_path_factory.mktemp("scenes")
    for split, seed in (("train2014", 1), ("val2014", 2)):
        scenes.write(folder, scenes=6, seed=seed, split=split)
    return folder


@pytest.fixture(autouse=True)
def plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "plan_run", kill_test.unplanned)


def words(files: Path, output: Path, *changes: str) -> list[str]:
    """A run on captions, drawn at a temperature at which the base goes wrong now and then."""
    sources = {split: f"{{jsonl: {files}/captions_{split}2014.jsonl, images: {files}}}" for split in ("train", "val")}
    return [
        str(ROOT / "configs/quickstart.yaml"),
        f"model={{path: {BASE}, dtype: float32, device: cpu}}",
        f"data={{train: {sources['train']}, validation: {sources['val']}, workers: 0}}",
        "lora={rank: 4, dropout: 0.1, targets: [language.*, vision.*, connector.*]}",
        "train={objective: reward, max_steps: 4, batch_size: 6, learning_rate: 1e-3, log_every: 1, save_every: 1, "
        "eval_every: 2}",
        "reward={samples: 3, temperature: 1.5}",
        "evaluation={count: 4, batch_size: 4}",
        f"output={output}",
        *changes,
    ]


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(scene_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "plan_run", kill_test.unplanned)
        output = tmp_path_factory.mktemp("straight") / "run"
        train.main(words(scene_files, output))
    return output


def test_a_run_logs_what_its_answers_are_worth(straight: Path) -> None:
    """Steps are compared by the metric of the task; the reference is not kept."""
    lines = logged(straight)
    learned = [line for line in lines if "reward" in line]
    assert [line["step"] for line in learned] == [1, 2, 3, 4]
    for line in learned:
        assert 0 < line["reward"] < 1
        assert 0 <= line["same_reward"] < 100
        assert 1 <= line["sample_tokens"] <= 30
        assert line["grad_norm"] > 0
    assert learned[-1]["kl"] != 0
    evaluated = [line for line in lines if "eval_accuracy" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    kept = json.loads((straight / "result.json").read_text())
    assert (kept["metric"], kept["finished"]) == ("accuracy", True)
    assert not (straight / "reference.safetensors").exists()
    said = "by rewards for its own answers (RLOO) to `captions_train2014.jsonl`"
    assert said in (straight / "adapter/README.md").read_text()
    assert "by rewards for its own answers to" in (straight / "report.html").read_text()


def test_a_run_that_was_killed_comes_to_the_same_adapter(
    scene_files: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the answers to a prompt are drawn again as they were, and are worth what they were."""
    output, steps, whole = tmp_path / "run", 0, GradientAccumulation.accumulate

    def dies(*given: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("killed")
        return whole(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(GradientAccumulation, "accumulate", dies)
        with pytest.raises(RuntimeError, match="killed"):
            train.main(words(scene_files, output))
    assert len(list(output.glob("checkpoints/step-*"))) == 2
    train.main(words(scene_files, output))
    assert kill_test.adapter(output) == kill_test.adapter(straight)


def test_steps_of_which_nothing_is_to_be_learned_change_nothing_and_end_no_run(
    scene_files: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the first one, in which it is looked at whether everything trained gets a gradient."""
    monkeypatch.setattr(run, "worth_of", lambda *_: lambda answer, record: 0.3)
    output = tmp_path / "run"
    start = [f"lora.start_from={straight}", "lora.dropout=0.0", "reward.kl=0.0", "train.max_steps=1"]
    train.main(words(scene_files, output, *start))
    (line,) = (line for line in logged(output) if "reward" in line)
    assert (line["same_reward"], line["kl"], line["grad_norm"], line["loss"]) == (100, 0, 0, 0)
    assert line["reward"] == pytest.approx(0.3)
    before, after = (load_file(of / "adapter/adapter_model.safetensors") for of in (straight, output))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lora=null"], "train.objective: reward compares the network with what it was"),
        (["data.answers=all"], "data.answers: got all; with train.objective=reward it has no meaning"),
        (["train.objective=supervised"], "reward.samples: got 3, and train.objective is supervised: set it to reward"),
        (["train.objective=dpo"], "reward.samples: got 3, and train.objective is dpo: set it to reward"),
        (["preference.beta=1"], "preference.beta: got 1.0, and train.objective is reward: set it to dpo"),
        (["reward.samples=1"], "reward.samples"),
        (["reward.temperature=0"], "reward.temperature"),
        (["reward.kl=-0.1"], "reward.kl"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes: Sequence[str], message: str, tmp_path: Path) -> None:
    config, *overrides = words(tmp_path, tmp_path / "run", *changes)
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (its text is compared below)
        load_config(config, overrides)
    assert message in " ".join(str(raised.value).split())


def test_a_task_that_judges_answers_together_is_refused_by_name(scene_files: Path, tmp_path: Path) -> None:
    """Before anything is read, also by --check; of a list with the place of its source."""
    said = (
        r"data\.train\.task is caption, whose CIDEr-D judges answers together, .* name one of vqa, answer, .*detect, or"
    )
    for more in ([], ["--check"]):
        with pytest.raises(ValueError, match=said):
            train.main([*words(scene_files, tmp_path / "run", "data.train.task=caption"), *more])
    several = "data.train=[{jsonl: a.jsonl, name: a}, {jsonl: b.jsonl, name: b, task: caption}]"
    with pytest.raises(ValueError, match=r"data\.train\.1\.task is caption"):
        worth_of(load_config(*split(words(scene_files, tmp_path / "run", several))))
    assert not (tmp_path / "run").exists()


def split(words: Sequence[str]) -> tuple[Path, Sequence[str]]:
    return Path(words[0]), words[1:]


def test_an_answer_is_worth_what_the_task_of_its_source_says(tmp_path: Path) -> None:
    """Official questions by all annotators' answers; and where there are several sources each record by its own."""
    official = "{questions: q.json, annotations: a.json, images: i, name: asked}"
    sources = f"data.train=[{official}, {{jsonl: b.jsonl, name: read, task: document}}]"
    worth = worth_of(load_config(*split(words(tmp_path, tmp_path / "run", sources))))
    assert worth is not None
    answers = ["red"] * 2 + ["crimson"] * 8
    assert worth("red", {"id": "asked/1", "answers": answers}) == pytest.approx(0.6)
    assert worth("Red.", {"id": "read/1", "answers": ["red"]}) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="'other/1' is of no source; expected one of asked, read"):
        worth("red", {"id": "other/1", "answers": answers})
    supervised = words(tmp_path, tmp_path / "run", sources, "train.objective=supervised", "reward={}")
    assert worth_of(load_config(*split(supervised))) is None


def test_the_plan_is_for_rows_with_all_samples(tmp_path: Path) -> None:
    """Also where the data cannot be read; and it knows that they are drawn."""
    config = load_config(*split(words(tmp_path, tmp_path / "run", "evaluation.max_new_tokens=5")))
    assert assumed_lengths(config) == Longest(24 + 3 * 5, 3 * 5, 8)
    planned = plan_run(config, PaliGemmaConfig.from_directory(BASE), Longest(39, 15, 8))
    assert planned.planner.samples == 3
    assert "drawing answers above that (estimate)" in planned.plan.components
