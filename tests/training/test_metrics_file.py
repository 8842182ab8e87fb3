"""A run's metrics: whole lines, and seconds that go on where a resumed run does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.training.batch_sampler import BatchSampler
from finetune.training.metrics_file import MetricsFile


def test_on_a_full_disk_a_line_of_metrics_is_left_out_whole_and_that_is_said_once(
    tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files end at 2,000 bytes; a short line finds room where a long one did not."""
    metrics: Any = MetricsFile(tmp_path / "metrics.jsonl", BatchSampler((40,), 10, 0, 9))
    state = type("State", (), {"global_step": 3})
    for length in (700, 500, 900, 900, 40):
        metrics.on_log(None, state, None, {"loss": "x" * length})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["loss"]) for line in lines] == [700, 500, 40]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl: lines are missing from step 3 on: ") == 1


def test_seconds_go_on_where_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """From the checkpoint's step on, not from what was trained behind it and lost."""
    file = tmp_path / "metrics.jsonl"
    before = [{"step": 10, "seconds": 100.0}, {"step": 20, "seconds": 200.0}, {"step": 25, "seconds": 250.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in before))
    metrics: Any = MetricsFile(file, BatchSampler((40,), 10, 0, 9))
    metrics.on_train_begin(None, SimpleNamespace(global_step=20), None)
    metrics.on_log(None, SimpleNamespace(global_step=21), None, {"loss": 1.0})
    line = json.loads(file.read_text().splitlines()[-1])
    assert 200.0 <= line["seconds"] < 201.0
    assert line["memory_gib"] > 0
