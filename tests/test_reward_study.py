"""The study of rewards: equal conditions for both arms, and figures that are what they are said to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

import train
from benchmarks import rewards as study
from benchmarks.rewards import BEGIN
from benchmarks.study import END, Job, interval
from data.synthetic import scenes
from finetune import run
from finetune.adapters.storage import file_parameters, read_adapter
from finetune.training.result import Result
from tests import kill_test


def train_here(jobs: Sequence[Job], workers: int, overrides: Sequence[str]) -> None:
    """Without processes of their own."""
    for job in jobs:
        train.main([str(job.config), *overrides, *job.changes])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two steps of two examples."""
    place, data = tmp_path_factory.mktemp("scenes"), {}
    for section, split, seed in (("train", "train2014", 1), ("validation", "val2014", 2)):
        scenes.write(place / "data", scenes=3, seed=seed, split=split, dissent=6)
        data[f"data.{section}"] = {
            "questions": f"{place}/data/v2_OpenEnded_mscoco_{split}_questions.json",
            "annotations": f"{place}/data/v2_mscoco_{split}_annotations.json",
            "images": f"{place}/data/images",
        }
    sizes = {"train.max_steps": 2, "train.batch_size": 2, "train.micro_batch": 2, "train.eval_every": 1}
    return [f"{key}={json.dumps(value)}" for key, value in {**data, **sizes, "train.log_every": 1}.items()]


@pytest.fixture(scope="module")
def studied(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of finished runs, with a document and a plot."""
    place = tmp_path_factory.mktemp("study")
    (place / "page.md").write_text(f"before\n\n{BEGIN}\n\nan earlier table\n\n{END}\n\nafter\n")
    files = f"--runs {place}/runs --document {place}/page.md --plot {place}/plot.png --seeds 1 2"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "train_all", train_here)
        patched.setattr(run, "plan_run", kill_test.unplanned)  # planning takes longer than a run
        study.main([*files.split(), "--", *settings])
    return place


def test_arms_differ_in_what_they_learn_from_and_how_fast_alone() -> None:
    assert {path.stem for path in study.CONFIGS.glob("*.yaml")} == {study.START.stem, *study.ARMS}
    files = {path.stem: yaml.safe_load(path.read_text()) for path in study.CONFIGS.glob("*.yaml")}
    assert all(files[arm]["lora"] == {"start_from": files["start"]["output"]} for arm in study.ARMS)
    assert tuple(files[arm]["train"].pop("objective") for arm in study.ARMS) == study.ARMS
    for arm in study.ARMS:
        del files[arm]["train"]["learning_rate"]  # each has the one that is best for it
    for config in files.values():
        del config["output"]
    assert files["reward"].pop("reward")
    assert files["reward"] == files["supervised"]
    for section in ("model", "data", "evaluation"):
        assert files["start"][section] == files["reward"][section]


def job_of(studied: Path, arm: str, seed: int) -> Job:
    return Job(study.CONFIGS / f"{arm}.yaml", seed, studied / f"runs/{arm}/seed{seed}")


def test_the_table_says_what_the_runs_measured(studied: Path, settings: list[str]) -> None:
    text = (studied / "page.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{BEGIN}\n")
    assert "an earlier table" not in text
    _, _, start, *body = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    kept = Result.read(studied / "runs/start")
    assert kept is not None
    assert start[:2] == ["start", f"{kept.metric_value:.1f}"]
    overrides = [f"lora.start_from={studied}/runs/start", *settings]
    for arm, cells in zip(study.ARMS, body, strict=True):
        runs = [study.measured(job_of(studied, arm, seed), overrides) for seed in (1, 2)]
        assert [step for step, _ in runs[0].accuracy] == [1, 2]
        assert cells[0] == f"`{arm}`"
        assert cells[1] == f"**{interval([found.accuracy[-1][1] for found in runs])}**"
        assert cells[3] == f"**{interval([found.drawn for found in runs])}**"
        assert [bool(cells[at].strip()) for at in (2, 4, 5)] == [arm == "reward"] * 3
        started = yaml.safe_load((studied / f"runs/{arm}/seed2/config.yaml").read_text())["lora"]["start_from"]
        assert started == f"{studied}/runs/start"
    assert (studied / "plot.png").stat().st_size > 10_000


def test_drawn_answers_are_those_of_the_network_that_is_measured(studied: Path, settings: list[str]) -> None:
    """Before a run's first step that of the adapter which it starts from: of the same values, the same answers."""
    overrides = [f"lora.start_from={studied}/runs/start", *settings]
    for arm in study.ARMS:
        _, model = study.start_of(job_of(studied, arm, 1), overrides)
        _, stored = read_adapter(studied / "runs/start/adapter")
        begun = {name: parameter.detach() for name, parameter in file_parameters(model).items()}
        assert begun.keys() == stored.keys()
        assert all(torch.equal(begun[name], stored[name]) for name in stored)


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--seeds \[1\]: expected 2 to 10 different ones"):
        study.main(["--seeds", "1"])
