"""The report of a run, from the files that the run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

from data.records import load_records
from data.synthetic import scenes
from finetune.config.load import load_config
from finetune.evaluation.answer import texts_alone
from finetune.evaluation.tasks import TASKS
from finetune.evaluation.vqa_accuracy import write_results
from finetune.report import result_page
from finetune.training.result import Result

ROOT = Path(__file__).parents[2]


def test_scores_have_an_interval_for_each_type_of_answer(tmp_path: Path) -> None:
    """The answers: every other yes/no question right, all others wrong."""
    scenes.write(tmp_path, scenes=20, seed=1, split="val2014")
    source = {
        "questions": f"{tmp_path}/v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": f"{tmp_path}/v2_mscoco_val2014_annotations.json",
        "images": f"{tmp_path}/images",
        "count": 30,
    }
    overrides = [f"data.validation={json.dumps(source)}", f"output={tmp_path}"]
    config = load_config(ROOT / "configs/quickstart.yaml", overrides)
    records = list(load_records(**config.data.only("validation").model_dump(exclude={"task", "name", "weight"})))
    asked = [record for record in records if record["answer_type"] == "yes/no"]
    known = {record["id"]: record["answer"] for record in asked[::2]}
    answers = {record["id"]: known.get(record["id"], "nothing") for record in records}
    (tmp_path / "eval/adapter").mkdir(parents=True)
    write_results(tmp_path / "eval/adapter/results.json", answers)
    reported = result_page.scores_of(config)["adapter"]
    assert reported["score"] == pytest.approx(100 * len(known) / 30, abs=0.01)
    alone = TASKS["vqa"].score(texts_alone({record["id"]: answers[record["id"]] for record in asked}), asked)
    found = reported["by_answer_type"]["yes/no"]
    assert found["questions"] == len(asked) < 30
    assert found["score"] == pytest.approx(100 * len(known) / len(asked), abs=0.01)
    assert found["interval"] == [round(bound, 2) for bound in alone.interval]
    assert found["interval"][0] < found["score"] < found["interval"][1]
    assert reported["by_answer_type"]["other"]["score"] == 0


def test_texts_of_data_and_configuration_stay_texts_in_markdown() -> None:
    scored = {"score": 50.0, "interval": [40.0, 60.0], "questions": 9}
    report: dict[str, Any] = {
        "metric": "accuracy",
        "unit": "percent",
        "scores": {"adapter": scored | {"by_answer_type": {"a|b\n# <b>": scored}}},
        "training": {"steps": 1, "hours": 0.1, "kept_step": 1, "kept_for": "best accuracy", "stages": {}},
        "data": {},
        "environment": {},
        "configuration": {"data": {"prompt": "```\n# mine\n{question}"}},
    }
    tokens = MarkdownIt("commonmark").enable("table").parse(result_page.markdown(report))
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    assert len([token for token in tokens if token.type == "th_open"]) == 4
    assert not [child for token in tokens for child in token.children or [] if child.type.startswith("html")]


def test_the_time_of_a_resumed_run_is_that_of_all_its_sessions(tmp_path: Path) -> None:
    """Half an hour until it was interrupted, then a quarter from its checkpoint on: the lines' clock goes on where it
    was. The kept step is that of result.json.
    """
    rows: list[dict[str, float]] = [
        {"step": 10, "seconds": 900.0, "loss": 1.0},
        {"step": 20, "seconds": 1800.0, "eval_accuracy": 61.5},
        {"step": 20, "seconds": 2250.0, "eval_accuracy": 61.5},
        {"step": 30, "seconds": 2700.0, "eval_accuracy": 60.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Result(20, "best accuracy", "accuracy", 61.5, 0.5).written(tmp_path):
        pass
    assert result_page.training_of(tmp_path) == {
        "hours": 0.75,
        "steps": 30,
        "kept_step": 20,
        "kept_for": "best accuracy",
        "score_at_kept_step": 61.5,
        "validation_loss_at_kept_step": 0.5,
    }


def test_the_gpu_and_its_driver_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA GeForce RTX 3070", total_memory=8 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        result_page, "output_of", lambda command: {"nvidia-smi": "580.1\n580.1", "git": "abc"}[command[0]]
    )
    reported = result_page.environment_of(torch.device("cuda"))
    assert (reported["device"], reported["memory_gib"], reported["driver"]) == ("NVIDIA GeForce RTX 3070", 8.0, "580.1")
    assert reported["commit"] == "abc"


def test_a_program_that_is_missing_or_fails_has_no_output() -> None:
    assert result_page.output_of(["no-such-program"]) is None
    assert result_page.output_of(["false"]) is None
    assert result_page.output_of(["echo", "hello"]) == "hello"
