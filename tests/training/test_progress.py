"""How far a run is: figures that fit beside a bar, lines where nobody looks on."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from finetune.training import progress
from finetune.training.progress import BAR, ProgressBar, ProgressLines

ANY: Any = None  # what a callback does not look at


def follow(callback: Any, steps: int, start: int, logs: Mapping[int, list[dict[str, float]]]) -> None:
    """Call a callback as the Trainer does, from `start` to the last step."""
    state = SimpleNamespace(max_steps=steps, global_step=start)
    callback.on_train_begin(ANY, state, ANY)
    for step in range(start + 1, steps + 1):
        state.global_step = step
        callback.on_step_end(ANY, state, ANY)
        for found in logs.get(step, ()):
            if isinstance(callback, ProgressLines):
                callback.metrics.line = {"seconds": 60.0 * step}
            callback.on_log(ANY, state, ANY, found)
    callback.on_train_end(ANY, state, ANY)


def test_a_line_at_each_tenth_and_at_each_evaluation_with_what_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines(SimpleNamespace(line={}))  # type: ignore[arg-type]
    logs: dict[int, list[dict[str, float]]] = {step: [{"loss": 1 / step}] for step in range(5, 101, 5)}
    logs[35].append({"eval_loss": 0.5, "eval_accuracy": 61.234})
    follow(lines, 100, start=70, logs=logs)
    assert capsys.readouterr().out.splitlines() == [
        "step 80 of 100, 80.0 minutes: loss 0.0125",
        "step 90 of 100, 90.0 minutes: loss 0.0111",
        "step 100 of 100, 100.0 minutes: loss 0.0100",
    ]
    follow(lines, 100, start=0, logs=logs)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said[:5]] == [
        "step 10 of 100",
        "step 20 of 100",
        "step 30 of 100",
        "step 35 of 100",
        "step 40 of 100",
    ]
    assert said[3] == "step 35 of 100, 35.0 minutes: loss 0.0286, val loss 0.5000, accuracy 61.23"


def test_at_80_columns_the_figures_of_a_long_run_leave_the_bar_room() -> None:
    """Of five-digit steps, with a day left, at some seconds a step."""
    bar = ProgressBar()
    bar.on_log(ANY, ANY, ANY, {"loss": 12.3456})
    bar.on_log(ANY, ANY, ANY, {"eval_loss": 12.3456, "eval_accuracy": 98.66})
    line = tqdm.format_meter(
        12345, 44376, 12345 * 3.21, 80, "training", unit="step", bar_format=BAR, postfix=bar.beside_the_bar()
    )
    assert line.startswith("training 12345/44376 ")
    assert line.endswith(" 28:33:39 left,  3.21s/step, loss 12.3456, accuracy 98.66")
    assert len(line) == 80


def test_the_bar_shows_steps_and_the_last_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    made = partial(progress.progress_bar, file=terminal, ncols=80, mininterval=0)
    monkeypatch.setattr(progress, "progress_bar", made)
    evaluated = {"eval_loss": 0.4, "eval_accuracy": 50.0}
    follow(ProgressBar(), 20, start=10, logs={12: [{"loss": 0.5}, evaluated], 20: [{"loss": 0.25}]})
    drawn = [line.strip() for line in terminal.getvalue().split("\r") if line.strip()]
    assert drawn[0].startswith("training 10/20")
    assert drawn[-1].startswith("training 20/20")
    assert drawn[-1].endswith("loss 0.2500, accuracy 50.00")
