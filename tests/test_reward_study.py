"""The study of rewards: equal conditions for both arms, and figures that are what they are said to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

import train
from benchmarks import rewards as study
from benchmarks.rewards import BEGIN, Measured, measured
from benchmarks.study import END, Job, interval
from data.synthetic import scenes
from finetune import run
from finetune.training.result import Result
from tests import kill_test


def train_here(jobs: Sequence[Job], workers: int, overrides: Sequence[str]) -> None:
    """Without processes of their own."""
    for job in jobs:
        train.main([str(job.config), *overrides, *job.changes])


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of finished runs of two steps each, with a document and a plot."""
    place, data = tmp_path_factory.mktemp("study"), {}
    for section, split, seed in (("train", "train2014", 1), ("validation", "val2014", 2)):
        scenes.write(place / "data", scenes=3, seed=seed, split=split, dissent=6)
        data[f"data.{section}"] = {
            "questions": f"{place}/data/v2_OpenEnded_mscoco_{split}_questions.json",
            "annotations": f"{place}/data/v2_mscoco_{split}_annotations.json",
            "images": f"{place}/data/images",
        }
    sizes = {"train.max_steps": 2, "train.batch_size": 2, "train.micro_batch": 2, "train.eval_every": 1}
    settings = [f"{key}={json.dumps(value)}" for key, value in {**data, **sizes, "train.log_every": 1}.items()]
    (place / "page.md").write_text(f"before\n\n{BEGIN}\n\nan earlier table\n\n{END}\n\nafter\n")
    files = f"--runs {place}/runs --document {place}/page.md --plot {place}/plot.png --seeds 1 2"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "train_all", train_here)
        patched.setattr(run, "plan_run", kill_test.unplanned)  # planning takes longer than a run
        study.main([*files.split(), "--", *settings])
    return place


def test_arms_differ_in_what_they_learn_from_alone() -> None:
    assert {path.stem for path in study.CONFIGS.glob("*.yaml")} == {study.START.stem, *study.ARMS}
    files = {path.stem: yaml.safe_load(path.read_text()) for path in study.CONFIGS.glob("*.yaml")}
    assert all(files[arm]["lora"] == {"start_from": files["start"]["output"]} for arm in study.ARMS)
    assert tuple(files[arm]["train"].pop("objective") for arm in study.ARMS) == study.ARMS
    for config in files.values():
        del config["output"]
    assert files["reward"].pop("reward")
    assert files["reward"] == files["supervised"]
    for section in ("model", "data", "evaluation"):
        assert files["start"][section] == files["reward"][section]


def test_the_table_says_what_the_runs_measured(studied: Path) -> None:
    text = (studied / "page.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{BEGIN}\n")
    assert "an earlier table" not in text
    header, _, *body = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    rows = {cells[0].strip("`"): dict(zip(header, cells, strict=True)) for cells in body}
    assert list(rows) == ["start", "reward", "supervised"]
    kept = Result.read(studied / "runs/start")
    assert kept is not None
    assert rows["start"]["accuracy"] == f"{kept.metric_value:.1f}"
    for arm in study.ARMS:
        runs = [measured(studied / f"runs/{arm}/seed{seed}") for seed in (1, 2)]
        assert [step for step, _ in runs[0].accuracy] == [1, 2]
        assert rows[arm]["accuracy"] == f"**{interval([found.accuracy[-1][1] for found in runs])}**"
        assert bool(rows[arm]["KL"].strip()) == (arm == "reward")
        started = yaml.safe_load((studied / f"runs/{arm}/seed2/config.yaml").read_text())["lora"]["start_from"]
        assert started == f"{studied}/runs/start"
    assert rows["supervised"]["to `supervised`"].strip() == ""
    assert (studied / "plot.png").stat().st_size > 10_000


def test_figures_are_those_of_the_first_and_the_last_lines(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [
        {"step": 10, "reward": 0.5, "kl": 0.01},
        {"step": 10, "eval_accuracy": 70.0},
        {"step": 20, "reward": 0.625, "kl": 0.25},
        {"step": 20, "eval_accuracy": 75.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured(tmp_path) == Measured([(10, 70.0), (20, 75.0)], (50, 62.5, 0.25))


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--seeds \[1\]: expected 2 to 10 different ones"):
        study.main(["--seeds", "1"])
