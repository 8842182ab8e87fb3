"""A run on several sources: trained, interrupted, resumed, evaluated by source, reported."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import evaluate
from finetune.config.load import load_config
from finetune.run import callbacks_for, learn
from finetune.training.trainer import LoRATrainer
from tests.test_scripts import base_with_scenes, digest, files, overrides
from tests.training.test_run_on_parquet import Interrupt, Interrupted

CONFIG = "configs/mixture.yaml"


def words_of(base: Path, output: Path, *more: str) -> list[str]:
    """Small sources in the place of those of the configuration."""
    captions = {split: {"jsonl": f"{base}/data/captions_{split}.jsonl"} for split in ("train2014", "val2014")}
    data: dict[str, Any] = {
        "train": [
            files(base, "train2014") | {"name": "questions", "weight": 3},
            captions["train2014"] | {"name": "captions", "weight": 1},
        ],
        "validation": [
            files(base, "val2014") | {"name": "questions"},
            captions["val2014"] | {"name": "captions", "task": "caption"},
        ],
        "workers": 0,
    }
    return [*overrides(base, output), f"data={json.dumps(data)}", *more]


def test_a_run_on_a_mixture_from_its_start_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_with_scenes(tmp_path / "base")
    whole, run = (words_of(base, tmp_path / name, "train.save_every=2") for name in ("whole", "run"))
    learn(load_config(CONFIG, whole), [])
    with monkeypatch.context() as stopping:
        real = callbacks_for
        stopping.setattr("finetune.run.callbacks_for", lambda *given: [*real(*given), Interrupt()])
        with pytest.raises(Interrupted):
            learn(load_config(CONFIG, run), [])
    other = [*run, "data.train.1.weight=2"]
    with pytest.raises(ValueError, match=r"data\.train\.1\.weight: was 1(\.0)?, is 2"):
        learn(load_config(CONFIG, other), [])
    learn(load_config(CONFIG, run), [])
    adapters = [digest(tmp_path / name / "adapter")["adapter_model.safetensors"] for name in ("whole", "run")]
    assert adapters[0] == adapters[1]

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "eval_loss" in line][-1]
    both = (last["eval_questions_accuracy"] * last["eval_captions_cider"]) ** 0.5
    assert last["eval_mean_of_sources"] == pytest.approx(both)

    evaluate.main([CONFIG, *run])
    metrics = json.loads((tmp_path / "run/eval/adapter/metrics.json").read_text())
    assert {name: of["metric"] for name, of in metrics["by_source"].items()} == {
        "questions": "VQA accuracy",
        "captions": "CIDEr-D",
    }
    answers = [json.loads(line) for line in (tmp_path / "run/eval/adapter/answers.jsonl").read_text().splitlines()]
    assert {answer["id"].split("/")[0] for answer in answers} == {"questions", "captions"}
    page = (tmp_path / "run/report.html").read_text()
    assert "<h2>By source</h2>" in page
    assert re.search(r"validation questions \(questions\) it answers [\d.]+% rightly", page)
    assert re.search(
        r"validation questions \(captions\) have CIDEr-D of [\d.]+, times 100 \(.*; those of the base", page
    )
    assert "geometric mean of" not in page.split("<h2>By source</h2>")[0].split("</style>")[1]
    assert "<td>captions</td><td>CIDEr-D" in page
    assert str(tmp_path) not in page


def test_with_a_limit_each_source_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_with_scenes(tmp_path / "base")
    evaluate.main([CONFIG, *words_of(base, tmp_path / "run"), "--arm", "base", "--limit", "4"])
    shown = capsys.readouterr().out
    assert "questions:" in shown
    assert "captions:" in shown


def test_a_run_that_gets_no_better_stops_and_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is learned at this rate; the same command says that it is finished, more patience goes on."""
    base = base_with_scenes(tmp_path / "base")
    auto = [
        f"data={{train: {json.dumps(files(base, 'train2014'))}, validation: auto, workers: 0}}",
        "train.learning_rate=1e-12",
        "train.max_steps=8",
        "train.eval_every=1",
        "train.save_every=100",
        "evaluation.count=1",
    ]
    words = [*overrides(base, tmp_path / "run"), *auto, "train.patience=2"]
    learn(load_config("configs/quickstart.yaml", words), [])
    said = capsys.readouterr().out
    assert "stopped early, after step" in said
    result = json.loads((tmp_path / "run/result.json").read_text())
    stopped = result["stopped_at"]
    assert stopped < 8
    assert result["finished"]
    learn(load_config("configs/quickstart.yaml", words), [])
    assert "is finished: nothing is left to train" in capsys.readouterr().out
    longer = load_config("configs/quickstart.yaml", [*words, "train.patience=100"])
    learn(longer, [], accept_changes=True)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["stopped_at"], result["finished"]) == (None, True)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 8


def test_a_signal_in_the_step_that_patience_ends_with_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run has come to its end: resumed it would train a step that an undisturbed one does not."""
    base, evaluated = base_with_scenes(tmp_path / "base"), LoRATrainer.evaluate

    def interrupted(trainer: LoRATrainer) -> dict[str, float]:
        metrics = evaluated(trainer)
        if trainer.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return metrics

    monkeypatch.setattr(LoRATrainer, "evaluate", lambda trainer, *_, **__: interrupted(trainer))
    more = ("train.learning_rate=1e-20", "train.eval_every=1", "train.patience=1", "evaluation.count=1")
    config = load_config("configs/quickstart.yaml", overrides(base, tmp_path / "run", *more))
    learn(config, [])
    assert "stopped early, after step 2 of 4" in capsys.readouterr().out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["stopped_at"], result["finished"]) == (2, True)
