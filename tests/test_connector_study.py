"""The study of connectors: equal conditions for all, intervals as defined, finished runs are not repeated."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import pytest
from PIL import Image

import train
from benchmarks import connectors
from benchmarks.connectors import BEGIN
from benchmarks.study import END, T_975, Job, differences, interval, write_table
from data.synthetic import scenes
from finetune import cli, run
from finetune.config.load import load_config
from finetune.config.stages import runs_of
from tests import kill_test, preloaded

ROOT = Path(__file__).parent.parent
ARMS = ["linear", "pixel_shuffle"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two steps of two hard examples, from the tiny base itself."""
    directory = tmp_path_factory.mktemp("scenes")
    data = {}
    for section, split, seed in (("train", "train2014", 1), ("validation", "val2014", 2)):
        scenes.write(directory, scenes=4, seed=seed, split=split, level="hard")
        names = {"questions": "v2_OpenEnded_mscoco", "annotations": "v2_mscoco"}
        files = {name: f"{directory}/{start}_{split}_{name}.json" for name, start in names.items()}
        data[section] = files | {"images": f"{directory}/images"}
    changes = {"model.path": str(ROOT / "assets/tiny-base"), "model.device": "cpu", "image.size": 84}
    sizes = {"train.max_steps": 2, "train.batch_size": 2, "train.micro_batch": 2, "train.eval_every": 1}
    return [
        f"{key}={json.dumps(value)}" for key, value in {**changes, **sizes, "train.log_every": 1, "data": data}.items()
    ]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arms' configurations, with a stage of three steps instead of 50."""
    place = tmp_path_factory.mktemp("configs")
    for arm in ARMS:
        text = (connectors.CONFIGS / f"{arm}.yaml").read_text(encoding="utf-8")
        (place / f"{arm}.yaml").write_text(text.replace("name: align, max_steps: 50", "name: align, max_steps: 3"))
    (stage,) = load_config(place / "pixel_shuffle.yaml").stages
    assert stage.max_steps == 3
    return place


@pytest.fixture
def _short_stage(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectors, "CONFIGS", configs)


@pytest.fixture(scope="module")
def studied(settings: list[str], configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of finished runs, with a document and a plot."""
    place = tmp_path_factory.mktemp("study")
    (place / "study.md").write_text(f"before\n\n{BEGIN}\n\nan earlier table\n\n{END}\n\nafter\n")
    with mock.patch.object(subprocess, "run", preloaded_run), mock.patch.object(connectors, "CONFIGS", configs):
        connectors.main([*arguments(place), *settings])
    return place


def preloaded_run(command: Sequence[str], stdout: TextIO, env: dict[str, str], **_: int) -> Any:
    """Stands for `subprocess.run` of train.py: what the command prints, and how it ends, without Python's start."""
    ran = preloaded.run(trained, *command[2:], environment=env)
    stdout.write(ran.stdout + ran.stderr)
    return ran


def trained(_: Sequence[str]) -> None:
    run.plan_run = kill_test.unplanned  # type: ignore[assignment]
    cli.run(train.main)


def arguments(place: Path) -> list[str]:
    files = f"--runs {place}/runs --document {place}/study.md --plot {place}/study.png"
    return ["--arms", *ARMS, "--seeds", "1", "2", *files.split(), "--"]


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_arms_differ_in_the_connector_alone_and_see_as_many_examples() -> None:
    """Stages count, too: no arm takes more steps than another."""
    configs = {arm: load_config(connectors.CONFIGS / f"{arm}.yaml") for arm in connectors.ARMS}
    assert {path.stem for path in connectors.CONFIGS.glob("*.yaml")} == {*connectors.ARMS, "base"}
    steps = {arm: sum(run.train.max_steps or 0 for run in runs_of(config)) for arm, config in configs.items()}
    assert len(set(steps.values())) == 1, steps
    assert all(run.train.epochs is None for config in configs.values() for run in runs_of(config))
    for config in configs.values():
        same = config.model_dump(exclude={"connector", "stages", "output"})
        same["train"] = {**same["train"], "max_steps": None, "eval_every": None}
        same["model"] = {**same["model"], "connector": None}
        reference = configs[connectors.REFERENCE].model_dump(exclude={"connector", "stages", "output"})
        reference["train"] |= {"max_steps": None, "eval_every": None}
        reference["model"] |= {"connector": None}
        assert same == reference
        assert config.train.eval_every == config.train.max_steps
        assert config.evaluation.count is None
        assert config.connector.learning_rate is not None


def test_an_interval_is_students() -> None:
    """Its quantiles leave 2.5% on either side of the density, and five values give what is worked out by hand."""
    for freedom, quantile in T_975.items():
        normal = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        width = quantile / 20_000
        inside = sum((1 + ((i + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(20_000))
        assert abs(normal * inside * width - 0.475) < 2e-5, freedom
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert math.isclose(found.half, 2.776 * math.sqrt(2.5 / 5))
    assert (f"{found}", f"{found:+.2f}") == ("3.0 ± 2.0", "+3.00 ± 1.96")
    for values in ([1.0], [1.0] * 11):
        with pytest.raises(ValueError, match=rf"^{len(values)} values: an interval is known for 2 to 10 seeds"):
            interval(values)


def test_the_table_says_what_the_runs_measured(studied: Path) -> None:
    text = (studied / "study.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "an earlier table" not in text
    header, _, *body = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    header[header.index("to linear")] = "loss to linear"
    rows = {cells[0].strip("`"): dict(zip(header, cells, strict=True)) for cells in body}
    assert list(rows) == ARMS
    last: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for arm in ARMS:
        for seed in (1, 2):
            evaluations = [line for line in lines_of(studied / f"runs/{arm}/seed{seed}") if "eval_accuracy" in line]
            assert [line["step"] for line in evaluations] == [1, 2]
            last.setdefault(arm, []).append(evaluations[-1]["eval_accuracy"])
            losses.setdefault(arm, []).append(evaluations[-1]["eval_loss"])
        assert rows[arm]["loss"] == f"{interval(losses[arm]):.4f}"
        assert rows[arm]["accuracy"] == f"**{interval(last[arm])}**"
    above = [a - b for a, b in zip(last["pixel_shuffle"], last["linear"], strict=True)]
    assert rows["pixel_shuffle"]["to linear"] == f"{interval(above):+z.1f}"
    above = [a - b for a, b in zip(losses["pixel_shuffle"], losses["linear"], strict=True)]
    assert rows["pixel_shuffle"]["loss to linear"] == f"{interval(above):+z.4f}"
    assert (rows["linear"]["image tokens"], rows["pixel_shuffle"]["image tokens"]) == ("36", "9")
    assert rows["linear"]["trained of it"] == f"{128 * 128 + 128:,}"
    assert rows["pixel_shuffle"]["trained of it"] == f"{4 * 128 * 128 + 128:,}"
    for cost in ("GFLOP an example", "MiB a row"):  # the decoder has a quarter of the image tokens
        assert 0 < float(rows["pixel_shuffle"][cost]) < float(rows["linear"][cost])


@pytest.mark.usefixtures("_short_stage")
def test_a_run_with_an_alignment_stage_counts_its_steps(studied: Path, settings: list[str]) -> None:
    job = Job(connectors.CONFIGS / "pixel_shuffle.yaml", 1, studied / "runs/pixel_shuffle/seed1")
    (stage,) = load_config(connectors.CONFIGS / "pixel_shuffle.yaml").stages
    assert stage.max_steps
    measured = connectors.measured(job, settings)
    steps = [step for step, _ in measured.losses]
    assert steps == list(range(1, stage.max_steps + 2 + 1))
    own = [line["loss"] for line in lines_of(job.output) if "loss" in line]
    assert [loss for _, loss in measured.losses[-2:]] == own


def test_the_plot_is_a_small_image(studied: Path) -> None:
    with Image.open(studied / "study.png") as image:
        assert image.format == "PNG"
        assert image.width > 2 * image.height
    assert (studied / "study.png").stat().st_size < 150_000


@pytest.mark.usefixtures("_short_stage")
def test_finished_runs_are_not_repeated_and_the_table_is_the_same(
    studied: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(subprocess, "run", refuse)
    before = (studied / "study.md").read_text()
    connectors.main([*arguments(studied), *settings])
    assert (studied / "study.md").read_text() == before
    assert "4 of 4 runs are finished; 0 are left" in capsys.readouterr().out


def test_a_run_that_fails_ends_the_study_by_name(tmp_path: Path, settings: list[str]) -> None:
    (tmp_path / "study.md").write_text(f"{BEGIN}\n{END}\n")
    with pytest.raises(ValueError, match=r"^linear, seed 1: train\.py ended with 2; see (.*seed1\.log)$") as caught:
        connectors.main(["--workers", "1", *arguments(tmp_path), *settings, "lora.rank=0"])
    log = re.findall("see (.*)$", str(caught.value))[0]
    assert "lora.rank: got 0" in Path(log).read_text()
    assert [path.name for path in (tmp_path / "runs").rglob("*.log")] == ["seed1.log"]  # no other was begun


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--arms mlp: linear, which they are compared with, is missing"):
        connectors.main(["--arms", "mlp"])
    for seeds in (["1"], ["1", "1"]):
        with pytest.raises(ValueError, match=r"--seeds \[1.*\]: expected 2 to 10 different ones"):
            connectors.main(["--seeds", *seeds])
    (tmp_path / "study.md").write_text("no table")
    with pytest.raises(ValueError, match=r"study\.md has no place for the table: expected one line"):
        write_table(tmp_path / "study.md", BEGIN, ["| a |"])


def test_differences_are_taken_seed_by_seed() -> None:
    assert differences([3.0, 5.0], [1.0, 4.0]) == [2.0, 1.0]


def test_a_rolling_mean_looks_back_only() -> None:
    assert connectors.rolling([(10, 1.0), (20, 3.0), (30, 5.0), (40, 1.0)]) == [1.0, 2.0, 3.0, 3.0]
