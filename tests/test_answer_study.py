"""The study of answers: equal conditions for all arms, and figures that are what they are said to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

import train
from benchmarks import answers
from benchmarks.answers import BEGIN
from benchmarks.study import END, Job, interval
from data.synthetic import scenes
from finetune import run
from finetune.config.load import load_config
from finetune.config.schema import DataConfig
from finetune.evaluation.evaluate import mean_loss
from finetune.training.examples import open_examples, open_processor
from tests import kill_test

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two steps of two examples."""
    directory, data = tmp_path_factory.mktemp("scenes"), {}
    for section, split, seed in (("train", "train2014", 1), ("validation", "val2014", 2)):
        scenes.write(directory, scenes=3, seed=seed, split=split, dissent=6)
        data[section] = {
            "questions": f"{directory}/v2_OpenEnded_mscoco_{split}_questions.json",
            "annotations": f"{directory}/v2_mscoco_{split}_annotations.json",
            "images": f"{directory}/images",
        }
    sizes = {"train.max_steps": 2, "train.batch_size": 2, "train.micro_batch": 2, "train.eval_every": 1}
    sources = {f"data.{section}": files for section, files in data.items()}
    model = {"model.path": str(ROOT / "assets/tiny-base"), "model.device": "cpu", "train.log_every": 1}
    return [f"{key}={json.dumps(value)}" for key, value in {**sizes, **sources, **model}.items()]


@pytest.fixture(scope="module")
def studied(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of finished runs, with a document and a plot."""
    place = tmp_path_factory.mktemp("study")
    (place / "study.md").write_text(f"before\n\n{BEGIN}\n\nan earlier table\n\n{END}\n\nafter\n")
    files = f"--runs {place}/runs --document {place}/study.md --plot {place}/study.png"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(answers, "train_all", train_here)
        patched.setattr(run, "plan_run", kill_test.unplanned)  # planning takes longer than a run
        answers.main(["--seeds", "1", "2", "--steps", "3", *files.split(), "--", *settings])
    return place


def train_here(jobs: Sequence[Job], workers: int, overrides: Sequence[str]) -> None:
    """Without the processes that `train_all` starts, for which see tests/test_connector_study.py."""
    for job in jobs:
        train.main([str(job.config), *overrides, *job.changes])


def job_of(studied: Path, arm: str, seed: int) -> Job:
    return Job(answers.CONFIGS / f"{arm}.yaml", seed, studied / f"runs/{arm}/seed{seed}")


def test_arms_differ_in_the_answers_alone() -> None:
    configs = {arm: load_config(answers.CONFIGS / f"{arm}.yaml") for arm in answers.ARMS}
    known = get_args(DataConfig.model_fields["answers"].annotation)
    assert set(answers.ARMS) == set(known) == {path.stem for path in answers.CONFIGS.glob("*.yaml")}
    assert {arm: config.data.answers for arm, config in configs.items()} == {arm: arm for arm in answers.ARMS}
    same = [config.model_dump(exclude={"output": True, "data": {"answers"}}) for config in configs.values()]
    assert same == [same[0]] * 3


def test_the_table_says_what_the_runs_measured(studied: Path, settings: list[str]) -> None:
    text = (studied / "study.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{BEGIN}\n")
    assert "an earlier table" not in text
    header, _, *body = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    rows = {cells[0].strip("`"): cells for cells in body}
    assert list(rows) == list(answers.ARMS)
    jobs = {arm: [job_of(studied, arm, seed) for seed in (1, 2)] for arm in rows}
    results = {arm: [answers.measured(job, settings) for job in of_arm] for arm, of_arm in jobs.items()}
    for arm, cells in rows.items():
        assert cells[header.index("expected loss")] == f"**{interval([r.expected_loss for r in results[arm]]):.3f}**"
        assert cells[header.index("accuracy")] == f"**{interval([r.accuracy[-1][1] for r in results[arm]])}**"
        assert [visits for visits, _ in results[arm][0].accuracy] == [2, 4]
    at = header.index("answers a row")
    assert (rows["rotate"][at], rows["majority"][at]) == ("1.0", "1.0")
    assert float(rows["all"][at]) > 2
    assert float(rows["all"][at + 1]) > float(rows["rotate"][at + 1])
    assert (rows["rotate"][-1], rows["majority"][-1]) == ("1.00", "")
    assert 0 < float(rows["all"][-1]) < 1
    with Image.open(studied / "study.png") as image:
        assert image.format == "PNG"


def test_the_expected_loss_of_one_answer_a_question_is_its_loss(studied: Path, settings: list[str]) -> None:
    """Of a run's last state, not of the step that it kept; where all annotators agree, it is that of an evaluation."""
    job = job_of(studied, "all", 1)
    config, model = answers.last_state(job, settings)
    directory = Path(json.loads(settings[4].partition("=")[2])["images"]).parent
    scenes.write(directory, scenes=3, seed=2, split="val2014", dissent=0)
    examples = open_examples(config, "validation", processor := open_processor(ROOT / "assets/tiny-base", config))
    expected = mean_loss(model.eval(), processor, examples.records)
    assert answers.expected_loss(config, model) == pytest.approx(expected, rel=1e-5)


def test_the_trace_of_a_covariance_is_the_sum_of_the_variances() -> None:
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    expected = float(vectors.double().var(dim=0).sum())
    assert answers.trace_of_covariance(iter(vectors)) == pytest.approx(expected, rel=1e-12)


def test_too_few_seeds_or_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--seeds \[1\]: expected 2 to 10 different ones"):
        answers.main(["--seeds", "1"])
    with pytest.raises(ValueError, match="--steps 1: expected at least 2"):
        answers.main(["--steps", "1"])
