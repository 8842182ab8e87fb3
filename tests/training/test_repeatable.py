"""Twice the same run: on a CPU, with as many threads, its adapter is the same bit for bit, whatever the connector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train
from data.synthetic import scenes
from tests import kill_test

ROOT = Path(__file__).parents[2]
RESAMPLER = ["model.connector=resampler", "connector={latents: 5, depth: 2, learning_rate: 1e-2}"]
RESAMPLER += ["stages=[{name: align, max_steps: 2}]", "image.size=84"]
DENSE = ["model.connector=dense_dci", "connector.learning_rate=1e-2"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, scenes=6, seed=1, split="train2014")
    return directory


def adapter_of(examples: Path, output: Path, *settings: str) -> bytes:
    """The weights of a very short run, with dropout and order drawn from the seed."""
    files = {
        "questions": f"{examples}/v2_OpenEnded_mscoco_train2014_questions.json",
        "annotations": f"{examples}/v2_mscoco_train2014_annotations.json",
        "images": f"{examples}/images",
    }
    changes = [
        f"model.path={ROOT / 'assets/tiny-base'}",
        "model.device=cpu",
        f"data={{train: {json.dumps(files)}, workers: 0}}",
        "lora={rank: 4, alpha: 8, dropout: 0.1, targets: ['language.*', 'vision.*']}",
        "train={max_steps: 3, batch_size: 6, micro_batch: 3, learning_rate: 1e-2}",
        f"output={output}",
    ]
    train.main([str(ROOT / "configs/quickstart.yaml"), *changes, *settings])
    return (output / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("settings", [RESAMPLER, DENSE], ids=["resampler", "dense_dci"])
def test_a_run_that_is_repeated_gives_the_same_adapter(
    examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    """And one of another seed another one."""
    monkeypatch.setattr("finetune.run.plan_run", kill_test.unplanned)  # planning takes as long as the run
    seeds = {"once": 5, "again": 5, "other": 6}
    made = {name: adapter_of(examples, tmp_path / name, *settings, f"train.seed={s}") for name, s in seeds.items()}
    assert made["once"] == made["again"]
    assert made["once"] != made["other"]
