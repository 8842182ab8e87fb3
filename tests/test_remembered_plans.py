"""A plan from remembered counts is the one that is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.lengths import Longest
from finetune.config.load import load_config
from finetune.lora.linear import LoRAConfig
from finetune.preflight import run_plan
from model import ConnectorConfig, PaliGemmaConfig
from tests import kill_test, remembered_plans


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered_plans, "COUNTED", {})


def plan(overrides: list[str], longest: Longest) -> tuple[Any, ...]:
    words = [*kill_test.overrides(Path("data"), Path("unused")), "memory.budget_gib=8", *overrides]
    config = load_config(kill_test.ROOT / "configs/quickstart.yaml", words)
    made = run_plan.plan_run(config, PaliGemmaConfig.from_directory(Path(config.model.path)), longest)
    execution, planner = made.plan.execution, made.planner
    return made.plan, planner.evaluation(7, 5), planner.tflop(execution), planner.sizes, planner.trained


def test_a_plan_from_remembered_counts_is_the_one_that_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run with other batches and answers, and after one that shards what it counted."""
    one: tuple[list[str], Longest] = ([], Longest(32, 4, 4))
    other = (["train.batch_size=5", "train.micro_batch=auto"], Longest(32, 4, 2))
    monkeypatch.setattr(run_plan, "Planner", remembered_plans.Planner)
    counted = plan(*one), plan(*other)
    monkeypatch.setattr(run_plan, "Planner", remembered_plans.planner)
    with pytest.MonkeyPatch.context() as sharded:
        sharded.setattr(run_plan.distributed, "asks_for_fsdp", lambda: True)
        sharded.setattr(run_plan.distributed, "count", lambda: 2)
        assert plan(*one) != counted[0]
    assert (plan(*one), plan(*other)) == counted
    assert len(remembered_plans.COUNTED) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"config": PaliGemmaConfig(connector=ConnectorConfig("mlp"))},
        {"lora": LoRAConfig(rank=5)},
        {"lora": None},
        {"dtype": torch.bfloat16},
        {"tokens": 41},
        {"supervised": 4},
        {"device": torch.device("cuda")},
        {"quantize": "nf4"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_counted_differently_is_counted(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    class Counted:
        sizes: dict[str, int]

        def __init__(self, *_: Any) -> None:
            self.sizes = {}

    monkeypatch.setattr(remembered_plans, "Planner", Counted)
    given = {"config": PaliGemmaConfig(), "lora": LoRAConfig(rank=4), "dtype": torch.float32, "tokens": 40}
    given |= {"supervised": 3, "batch_size": 8, "device": torch.device("cpu"), "quantize": None, "answer": 3}
    for arguments, counts in ((given, 1), (given | {"batch_size": 9, "answer": 2}, 1), (given | change, 2)):
        remembered_plans.planner(**arguments)  # type: ignore[arg-type]
        assert len(remembered_plans.COUNTED) == counts
