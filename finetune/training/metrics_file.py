"""`metrics.jsonl` of a run: a line for each log and each evaluation. A line that cannot be written ends nothing."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.system.terminal import visible
from finetune.training.batch_sampler import BatchSampler


class MetricsFile(TrainerCallback):
    """Appends every log and evaluation to a file of JSON lines, with step, epoch, the seconds that were trained (those
    before an interruption included) and the GiB that are in use.
    """

    def __init__(self, path: Path, steps: BatchSampler) -> None:
        self.path, self.steps, self.failed = path, steps, False
        self.start = time.monotonic()
        self.line: dict[str, Any] = {}  # the last one

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.monotonic() - seconds_until(self.path, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        self.line = {
            "step": state.global_step,
            "epoch": round(state.global_step * self.steps.batch_size / self.steps.num_records, 4),
            "seconds": round(time.monotonic() - self.start, 1),
            "memory_gib": round(memory_in_use() / 2**30, 3),
            **{name: value for name, value in (logs or {}).items() if name != "epoch"},
        }
        try:
            append_line(self.path, json.dumps(self.line))
        except OSError as error:
            if not self.failed:
                said = f"{self.path}: lines are missing from step {state.global_step} on: {error}"
                tqdm.write(visible(said), file=sys.stderr)
            self.failed = True


def seconds_until(path: Path, step: int) -> float:
    """What a run had trained when it reached `step`, by its own lines; 0 where it has none."""
    if not path.is_file():
        return 0.0
    found = 0.0
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            found = float(line["seconds"]) if line["step"] <= step else found
    return found


def memory_in_use() -> int:
    """Bytes: the most that was reserved on the card so far; without a card what the process has in memory now."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    return int(psutil.Process().memory_info().rss)


def append_line(path: Path, line: str) -> None:
    """Append a line whole or not at all: half of one, on a disk that is full, would spoil the next one too."""
    with path.open("ab", buffering=0) as file:
        size, content = file.tell(), line.encode() + b"\n"
        if (written := file.write(content)) < len(content):
            file.truncate(size)
            raise OSError(f"{written} of {len(content)} bytes found room")
