"""What watches a run: its file of metrics, its progress, and if asked Weights & Biases or TensorBoard, which get the
same figures, and with each evaluation a few images with their answers.

Each is a Trainer callback. None of them can end a run: tracking that fails says so once and stays silent.
"""

from __future__ import annotations

import dataclasses
import secrets
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data.images import open_image
from finetune.config.load import dump_config
from finetune.config.schema import RunConfig
from finetune.system import distributed
from finetune.system.atomic import write_text_whole
from finetune.system.terminal import visible
from finetune.training.batch_sampler import BatchSampler
from finetune.training.metrics_file import MetricsFile
from finetune.training.progress import ProgressBar, ProgressLines

MOST_SAMPLES, SIDE = 8, 224  # answers shown at an evaluation; pixels of the longer side of their images


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image, white where a record has none, with its question, one right answer, and what was answered."""

    image: Image.Image
    question: str
    expected: str
    answer: str

    def __str__(self) -> str:
        return f"{self.question}\nexpected: {self.expected}\nanswered: {self.answer}"


class Samples:
    """The first few questions of the latest evaluation, the same ones each time; images are opened when asked for."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.answers: dict[str, str] = {}

    def keep(self, records: Iterable[Mapping[str, Any]], answers: Mapping[str, str]) -> None:
        """answers: by the id of the record."""
        self.records, self.answers = list(islice(records, MOST_SAMPLES)), dict(answers)

    def open(self) -> list[Sample]:
        return [self.sample(record) for record in self.records]

    def sample(self, record: Mapping[str, Any]) -> Sample:
        image = Image.new("RGB", (SIDE, SIDE), "white") if record["image"] is None else open_image(record["image"])
        image.thumbnail((SIDE, SIDE))
        return Sample(image, record["question"] or record["prefix"], record["answer"], self.answers[record["id"]])


def callbacks_for(
    config: RunConfig, steps: BatchSampler, samples: Samples | None = None, metric: str = "accuracy"
) -> list[TrainerCallback]:
    """The callbacks of a run; of several processes, one tracks for all.

    Args:
        samples: what an evaluation answered, to be shown where images can be.
        metric: what the run is judged by, to be shown beside the loss.
    """
    if not distributed.is_main():
        return []
    metrics, samples = MetricsFile(Path(config.output) / "metrics.jsonl", steps), samples or Samples()
    seen = ProgressBar(metric) if sys.stderr.isatty() else ProgressLines(metrics, metric)
    made: list[TrainerCallback] = [metrics, seen]
    if config.tracking.wandb != "off":
        made.append(Tracker("wandb", Wandb(config), metrics, samples))
    if config.tracking.tensorboard:
        made.append(Tracker("tensorboard", TensorBoard(Path(config.output)), metrics, samples))
    return made


def wandb_id(output: Path) -> str:
    """The id of the run's page, kept in its directory: a run that is resumed continues the page it began."""
    file = output / "wandb_id"
    if not file.exists():
        write_text_whole(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="utf-8").strip()


class Backend(Protocol):
    """Where figures and answers go."""

    def begin(self) -> None: ...

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def show(self, samples: Sequence[Sample], step: int) -> None: ...

    def finish(self) -> None: ...


class Tracker(TrainerCallback):
    """Hands the figures of metrics.jsonl, and the samples of each evaluation, to a backend. What fails there is said
    once, and is the end of it: no run ends for it.
    """

    def __init__(self, name: str, backend: Backend, metrics: MetricsFile, samples: Samples) -> None:
        self.name, self.backend, self.metrics, self.samples = name, backend, metrics, samples
        self.works = True

    def attempt(self, action: str, call: Callable[[], None]) -> None:
        if not self.works:
            return
        try:
            call()
        except Exception as error:  # of any kind: a night of training is worth more than its tracking
            said = f"{self.name}: {action} failed ({type(error).__name__}: {error}); going on without it"
            tqdm.write(visible(said), file=sys.stderr)
            self.works = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.attempt("starting", self.backend.begin)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        figures = {name: value for name, value in self.metrics.line.items() if name != "step"}
        self.attempt("logging", lambda: self.backend.log(figures, state.global_step))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.attempt("showing answers", lambda: self.backend.show(self.samples.open(), state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.attempt("finishing", self.backend.finish)


class Wandb:
    """A page of Weights & Biases; `offline` needs no network."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.page: Any = None

    def begin(self) -> None:
        import wandb
        import yaml

        tracking = self.config.tracking
        self.page = wandb.init(
            mode="online" if tracking.wandb == "online" else "offline",
            project=tracking.project,
            name=tracking.name or Path(self.config.output).name,
            id=wandb_id(Path(self.config.output)),
            resume="allow",
            dir=self.config.output,
            config=yaml.safe_load(dump_config(self.config)),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self.page.log(dict(figures), step=step)

    def show(self, samples: Sequence[Sample], step: int) -> None:
        import wandb

        if samples:
            self.page.log({"answers": [wandb.Image(one.image, caption=str(one)) for one in samples]}, step=step)

    def finish(self) -> None:
        self.page.finish()


class TensorBoard:
    """Event files in OUTPUT/tensorboard, by torch.utils.tensorboard; needs the package tensorboard."""

    def __init__(self, output: Path) -> None:
        self.directory = output / "tensorboard"
        self.writer: Any = None

    def begin(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def show(self, samples: Sequence[Sample], step: int) -> None:
        for number, one in enumerate(samples):
            pixels = torch.frombuffer(bytearray(one.image.tobytes()), dtype=torch.uint8)
            shape = (one.image.height, one.image.width, 3)
            self.writer.add_image(f"answers/{number}", pixels.view(shape), step, dataformats="HWC")
            self.writer.add_text(f"answers/{number}", textwrap.indent(str(one), "    "), step)  # a block of code
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()
