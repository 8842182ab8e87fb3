"""A small run and its network, for the tests before a run."""

from __future__ import annotations

import json
from pathlib import Path

from finetune import inject_lora
from finetune.config.schema import RunConfig
from model import PaliGemma
from model.random_init import from_random

ROOT = Path(__file__).parents[2]
BASE = ROOT / "assets/tiny-base"
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


def arguments(scenes: Path, output: Path, *more: str) -> list[str]:
    """The quickstart on a few scenes."""
    files = {
        "questions": f"{scenes}/v2_OpenEnded_mscoco_train2014_questions.json",
        "annotations": f"{scenes}/v2_mscoco_train2014_annotations.json",
        "images": f"{scenes}/images",
    }
    data = f"data={{train: {json.dumps(files)}, answers: majority, workers: 0}}"
    changes = [f"model.path={BASE}", "model.device=cpu", data, "train.eval_every=null", f"output={output}"]
    return [QUICKSTART, *changes, *more]


def run_config(targets: tuple[str, ...], batch_size: int, output: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(BASE), "dtype": "float32", "device": "cpu"},
            "data": {"train": {"jsonl": "unused.jsonl"}, "workers": 0},
            "lora": {"targets": list(targets)},
            "train": {"max_steps": 4, "batch_size": batch_size, "micro_batch": batch_size},
            "output": str(output),
        }
    )


def network(run: RunConfig) -> PaliGemma:
    model = from_random(BASE, 0)
    assert run.lora is not None
    inject_lora(model, run.lora)
    return model
