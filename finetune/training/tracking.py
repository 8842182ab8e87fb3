"""What watches a run: a line per log in `metrics.jsonl`, a progress bar, and Weights & Biases when asked.

Each is a Trainer callback. None of them can end a run: tracking that fails says so once and stays silent.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config.load import dump_config
from finetune.config.schema import RunConfig
from finetune.system import distributed
from finetune.system.atomic import write_text_whole
from finetune.system.terminal import visible
from finetune.training.batch_sampler import BatchSampler


def callbacks_for(config: RunConfig, steps: BatchSampler) -> list[TrainerCallback]:
    """The callbacks of a run; of several processes, one tracks for all."""
    if not distributed.is_main():
        return []
    made: list[TrainerCallback] = [MetricsFile(Path(config.output) / "metrics.jsonl", steps), ProgressBar()]
    return made + ([Wandb(config)] if config.tracking.wandb != "off" else [])


class MetricsFile(TrainerCallback):
    """Appends every log and evaluation to a file of JSON lines, with step, epoch, the seconds that were trained (those
    before an interruption included) and the GiB that are in use.
    """

    def __init__(self, path: Path, steps: BatchSampler) -> None:
        self.path, self.steps, self.failed = path, steps, False
        self.start = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.monotonic() - seconds_until(self.path, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        line = {
            "step": state.global_step,
            "epoch": round(state.global_step * self.steps.batch_size / self.steps.num_records, 4),
            "seconds": round(time.monotonic() - self.start, 1),
            "memory_gib": round(memory_in_use() / 2**30, 3),
            **{name: value for name, value in (logs or {}).items() if name != "epoch"},
        }
        try:
            append_line(self.path, json.dumps(line))
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


class ProgressBar(TrainerCallback):
    """BatchSampler done and left, with rate and remaining time, the last loss and the last accuracy."""

    def __init__(self) -> None:
        self.bar: tqdm[Any] | None = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        for name, label, digits in (
            ("loss", "loss", 4),
            ("eval_loss", "val loss", 4),
            ("eval_accuracy", "accuracy", 2),
        ):
            if name in (logs or {}):
                self.shown[label] = f"{logs[name]:.{digits}f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def wandb_id(output: Path) -> str:
    """The id of the run's page, kept in its directory: a run that is resumed continues the page it began."""
    file = output / "wandb_id"
    if not file.exists():
        write_text_whole(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()


class Wandb(TrainerCallback):
    """Logs to Weights & Biases; `offline` needs no network, and nothing that goes wrong there ends the run."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.logged = config, None

    def attempt(self, action: str, call: Any) -> Any:
        try:
            return call()
        except Exception as error:  # of any kind: a night of training is worth more than its tracking
            said = f"wandb: {action} failed ({type(error).__name__}: {error}); going on without it"
            tqdm.write(visible(said), file=sys.stderr)
            self.logged = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        def begin() -> Any:
            import wandb
            import yaml

            tracking = self.config.tracking
            return wandb.init(
                mode="online" if tracking.wandb == "online" else "offline",
                project=tracking.project,
                name=tracking.name or Path(self.config.output).name,
                id=wandb_id(Path(self.config.output)),
                resume="allow",
                dir=self.config.output,
                config=yaml.safe_load(dump_config(self.config)),
            )

        self.logged = self.attempt("starting", begin)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if (run := self.logged) is not None:
            self.attempt("logging", lambda: run.log(logs, step=state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if (run := self.logged) is not None:
            self.attempt("finishing", run.finish)
