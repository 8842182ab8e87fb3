"""What a few steps tell before a run of many hours: how long it will take on this device, and whether it learns at all.

Time: the parts of a step are those of the trainer itself, on made-up rows in a network of random weights. Not counted:
loading pictures, which goes on beside the computing, evaluations and checkpoints. Learning: a handful of examples is
learned by heart, as a run that can learn anything does within a hundred steps.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.config.schema import RunConfig
from finetune.preflight.plan import TERA, counting
from finetune.system.device import is_out_of_memory
from finetune.training.batch_sampler import BatchSampler
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import Collate, Example, ImageFeatures
from finetune.training.trainer import LoRATrainer
from model import IGNORE_INDEX, PaliGemma, PaliGemmaConfig

Answers = list[tuple[str, str, str]]  # question, wanted, answered
Ask = Callable[[], Answers]

REPEATS = 3  # of each part, after one to warm up
LOOKED_AT = 100  # steps that stand for all
TRIAL_STEPS = 100  # at most, to learn a handful of examples by heart
CHECK_EVERY = 5  # steps between the questions whether it has


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a step is made of: examples, how many different pictures they are about, and the tokens of a row."""

    examples: int
    pictures: float
    tokens: int
    supervised: int


@dataclasses.dataclass(frozen=True)
class Pace:
    """What the parts of a step take on a device.

    Attributes:
        pictures, rows: seconds of a micro-batch of pictures through the vision tower, and of one of rows through the
            decoder, forward and backward.
        update: seconds of clipping and AdamW. move: of bringing the tower to the device, where it leaves it.
        pictures_work, rows_work: TFLOP counted in the first two.
        peak: bytes that the device held at most; None where it does not say.
    """

    pictures: float
    rows: float
    update: float
    move: float
    pictures_work: float
    rows_work: float
    peak: int | None = None

    def parts(self, shape: Shape, micro_batch: int) -> tuple[int, int]:
        """Micro-batches of pictures and of rows in a step."""
        return math.ceil(shape.pictures / micro_batch), math.ceil(shape.examples / micro_batch)

    def seconds(self, shape: Shape, micro_batch: int) -> float:
        """Seconds of a step."""
        pictures, rows = self.parts(shape, micro_batch)
        return self.move + pictures * self.pictures + rows * self.rows + self.update

    def speed(self, shape: Shape, micro_batch: int) -> float:
        """TFLOP a second that a step achieves."""
        pictures, rows = self.parts(shape, micro_batch)
        return (pictures * self.pictures_work + rows * self.rows_work) / self.seconds(shape, micro_batch)


class MadeUp(Dataset[Example]):
    """Examples of random tokens, each with a picture of its own, all of one shape."""

    def __init__(self, config: PaliGemmaConfig, shape: Shape, count: int) -> None:
        self.config, self.shape, self.count = config, shape, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        config, generator = self.config, torch.Generator().manual_seed(index)
        side, images, tokens = config.vision.image_size, config.vision.num_patches, self.shape.tokens
        ids = torch.full((tokens,), config.image_token_id)
        ids[images:] = torch.randint(config.image_token_id, (tokens - images,), generator=generator)
        answer = torch.arange(tokens) >= tokens - self.shape.supervised
        return {
            "input_ids": ids,
            "token_type_ids": answer.long(),
            "labels": ids.where(answer, IGNORE_INDEX),
            "pixel_values": torch.rand(config.vision.num_channels, side, side, generator=generator) * 2 - 1,
            "id": str(index),
            "image_id": str(index),
        }


def pictures_of(steps: BatchSampler, image_ids: Sequence[str]) -> float:
    """How many different pictures a step is about, on average over the first steps of a run."""
    looked_at = range(min(LOOKED_AT, steps.total))
    return statistics.fmean(len({image_ids[index] for index, _ in steps[step]}) for step in looked_at)


def probe(run: RunConfig, model: PaliGemma, mode: ExecutionPlan, shape: Shape, collate: Collate) -> Pace:
    """Time the parts of a step of this shape, in this mode, on the device of `model`, whose adapters are in place.

    Raises:
        ValueError: the device has less memory than the plan took it to have.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        run = run.model_copy(update={"output": nowhere})
        rows = MadeUp(model.config, shape, mode.micro_batch)
        steps = BatchSampler(len(rows), len(rows), run.train.seed, 1)
        trainer = LoRATrainer(run, model, rows, steps, mode, collate, save_result=lambda _: None)
        try:
            return time_parts(trainer, [rows[index] for index in range(len(rows))])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"the device ran out of memory with {mode}, which should fit by the plan: close what else uses it, or "
                "lower memory.budget_gib"
            ) from error


def time_parts(trainer: LoRATrainer, rows: list[Example]) -> Pace:
    device, tokens = trainer.args.device, sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.network.train()
    optimizer = trainer.create_optimizer()
    images: ImageFeatures | None = None

    def move() -> None:
        with trainer.accumulation.vision_on_device():
            pass

    def encode() -> None:
        nonlocal images
        images = trainer.accumulation.frozen_image_features(rows)

    def decode() -> None:
        trainer.accumulation.micro_step(rows, images, tokens, step=0)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trainer.trained.values(), trainer.run.train.max_grad_norm)
        optimizer.step()

    moved, _ = timed(move, device)
    with trainer.accumulation.vision_on_device():
        encoded, encoded_work = timed(encode, device)
    decoded, decoded_work = timed(decode, device)
    updated, _ = timed(update, device)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return Pace(encoded, decoded, updated, moved, encoded_work, decoded_work, peak)


def timed(part: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds of a call, the median of a few, and its TFLOP, counted in one before them."""
    with counting() as counter:
        part()
    seconds = []
    for _ in range(REPEATS):
        wait(device)
        start = time.perf_counter()
        part()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), counter.get_total_flops() / TERA


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclasses.dataclass(frozen=True)
class Trial:
    """How learning a handful of examples by heart went: the loss of each step, and question, wanted and answer."""

    losses: list[float]
    rows: Answers

    @property
    def right(self) -> int:
        return sum(wanted == answered for _, wanted, answered in self.rows)

    @property
    def learned(self) -> bool:
        """All answers are right; the loss, too, has fallen, for the network may have known them before."""
        return self.right == len(self.rows) and self.losses[-1] < self.losses[0] / 2


def trial_config(run: RunConfig, count: int) -> RunConfig:
    """The run with `count` examples at each step, all the same: majority answers, constant rate, no dropout."""
    train = run.train
    micro_batch = train.micro_batch if train.micro_batch == "auto" else min(train.micro_batch, count)
    size = {"epochs": None, "max_steps": TRIAL_STEPS, "batch_size": count, "micro_batch": micro_batch}
    course = {"schedule": "constant", "warmup": 0.05, "log_every": 1, "eval_every": None}
    return run.model_copy(
        update={
            "data": run.data.model_copy(update={"answers": "majority", "workers": 0}),
            "lora": run.lora and dataclasses.replace(run.lora, dropout=0.0),
            "train": train.model_copy(update=size | course),
        }
    )


def learn_by_heart(
    run: RunConfig,
    model: PaliGemma,
    dataset: Dataset[Example],
    mode: ExecutionPlan,
    collate: Collate,
    ask: Ask,
) -> Trial:
    """Train on all examples of `dataset` at each step until they are answered as wanted; nothing is kept of it.

    Args:
        run: as `trial_config` makes it.
        model: with adapters in place.
        ask: lets the model answer.

    Raises:
        ValueError: loss or gradients became infinite.
    """
    count, watch = run.train.batch_size, Watch(ask)
    with tempfile.TemporaryDirectory() as nowhere:
        run = run.model_copy(update={"output": nowhere})
        trainer = LoRATrainer(
            run,
            model,
            dataset,
            BatchSampler(count, count, run.train.seed, TRIAL_STEPS),
            mode,
            collate,
            save_result=lambda _: None,
            callbacks=[watch],
            save_checkpoints=False,
        )
        watch.ready = trainer.accumulation.vision_on_device
        try:
            trainer.train()
        except FloatingPointError as error:
            rate, where = run.train.learning_rate, str(error).partition("; the step was not taken")[0]
            raise ValueError(f"nothing can be learned so: lower train.learning_rate ({rate}); {where}") from error
    return watch.trial


class Watch(TrainerCallback):
    """Asks every few steps whether all is learned, and stops the training when it is.

    ready: within this context the whole network is on its device.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask, self.trial = ask, Trial([], [])
        self.ready: Callable[[], AbstractContextManager[object]] = nullcontext

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if "loss" not in (logs or {}):
            return
        self.trial.losses.append(logs["loss"])
        if state.global_step % CHECK_EVERY == 0:
            with self.ready():
                self.trial = Trial(self.trial.losses, self.ask())
            control.should_training_stop = self.trial.learned
