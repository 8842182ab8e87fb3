"""The study of preferences: pairs of a network's own answers, every arm run, figures that are what they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

import train
from benchmarks import preferences as study
from benchmarks.preferences import BEGIN, Measured, measured, sentence
from benchmarks.study import END, Job
from data.synthetic import scenes
from finetune import run
from tests import kill_test

ROOT = Path(__file__).parent.parent


def train_here(jobs: Sequence[Job], workers: int, overrides: Sequence[str]) -> None:
    """Without processes of their own."""
    for job in jobs:
        if not job.finished:
            train.main([str(job.config), *overrides, *job.changes])


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of finished runs of two steps each, with a document and a plot."""
    place = tmp_path_factory.mktemp("study")
    blunt = yaml.safe_load((ROOT / "configs/preferences/blunt.yaml").read_text())
    for section, split, seed in (("train", "train2014", 1), ("validation", "val2014", 2)):
        scenes.write(place / "data", scenes=3, seed=seed, split=split)
        for key, value in blunt["data"][section].items():
            blunt["data"][section][key] = value.replace("runs/preferences/data", f"{place}/data")
    blunt["train"] |= {"max_steps": 2, "batch_size": 4, "micro_batch": 4}
    blunt["train"].pop("eval_every")
    (place / "blunt.yaml").write_text(yaml.safe_dump(blunt))
    (place / "page.md").write_text(f"before\n\n{BEGIN}\n\nan earlier table\n\n{END}\n\nafter\n")
    images = [f"data.{split}.images={place}/data/images" for split in ("train", "validation")]
    sizes = ["train.max_steps=2", "train.batch_size=4", "train.micro_batch=4", "train.eval_every=2"]
    files = f"--runs {place}/runs --document {place}/page.md --plot {place}/plot.png --seeds 1 2"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "train_all", train_here)
        patched.setattr(study, "BLUNT", place / "blunt.yaml")
        patched.setattr(run, "plan_run", kill_test.unplanned)  # planning takes longer than a run
        study.main([*files.split(), "--", *images, *sizes])
    return place


def test_every_arm_is_trained_from_the_blunt_adapter_and_stands_in_the_table(studied: Path) -> None:
    text = (studied / "page.md").read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "an earlier table" not in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["blunt adapter", "`dpo`", "`rpo`", "`supervised`"]
    assert [bool(row[5].strip()) for row in rows[2:]] == [False, True, True, False], "KL, where pairs are measured"
    assert (studied / "plot.png").stat().st_size > 10_000
    for arm in ("dpo", "rpo", "supervised"):
        started = yaml.safe_load((studied / f"runs/{arm}/seed2/config.yaml").read_text())["lora"]["start_from"]
        assert started == f"{studied}/runs/blunt"


def test_pairs_prefer_a_sentence_to_what_the_network_said(studied: Path) -> None:
    answers = {line["id"]: line for line in study.lines_of(studied / "runs/asked-train/adapter/answers.jsonl")}
    pairs = study.lines_of(studied / "runs/train.jsonl")
    assert pairs
    for pair in pairs:
        line = answers[pair["id"]]
        assert pair["rejected"] == line["answer"]
        assert pair["suffix"] == sentence(pair["question"], max(set(line["expected"]), key=line["expected"].count))


def test_figures_are_those_of_the_answers(tmp_path: Path) -> None:
    asked = "how many circles are there?"
    answers = ["there are 3 circles", "There are three circles.", "3", "there are 4 circles"]
    lines = [{"id": str(n), "question": asked, "answer": answer} for n, answer in enumerate(answers)]
    right = dict.fromkeys("0123", "3")
    assert measured(lines, right) == Measured(in_a_sentence=75, right=75, the_sentence=50)
    logged = [{"step": 1, "eval_kl": 0.1, "eval_pair_accuracy": 50.0}, {"step": 2, "eval_kl": 0.3}, {"loss": 1.0}]
    logged[1]["eval_pair_accuracy"] = 75.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    assert measured(lines, right, tmp_path) == Measured(75, 75, 50, pairs=75.0, kl=0.3)


def test_every_question_of_the_scenes_has_a_sentence() -> None:
    assert sentence("is there a red circle?", "no") == "no, there is no red circle"
    assert sentence("is there anything blue?", "yes") == "yes, something is blue"
    assert sentence("what color is the circle?", "red") == "the circle is red"
    assert sentence("what is the red shape?", "square") == "the red shape is square"
    with pytest.raises(ValueError, match="question 'why\\?'; expected one that"):
        sentence("why?", "because")
