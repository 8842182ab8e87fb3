"""How long a step will take on this device, found out before a run of many hours.

The phases of a step are timed as the trainer itself runs them, on random rows in a network of random weights, all of
them with an image. Not counted: loading images, which happens in workers beside the computing, evaluations and
checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset

from data.text_rows import names_image
from finetune.config.schema import RunConfig
from finetune.preflight.count import TERA, flop_counter
from finetune.system.device import is_out_of_memory
from finetune.system.progress import progress_bar
from finetune.training.batch_sampler import BatchSampler
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.optimizer import clip_gradients, total_norm
from finetune.training.step_inputs import Collate, Example, ImageFeatures
from finetune.training.trainer import LoRATrainer
from model import IGNORE_INDEX, PaliGemma, PaliGemmaConfig

REPEATS = 3  # of each phase, after one to warm up
SAMPLED_STEPS = 100  # steps of a run whose images are counted


@dataclasses.dataclass(frozen=True)
class StepWorkload:
    """What a step is made of: examples, how many different images they are about, the tokens of a row with an image,
    and the share of rows that have none, which are shorter.
    """

    examples: int
    images: float
    tokens: int
    supervised: int
    texts: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepTime:
    """What the phases of a step take on a device.

    Attributes:
        encode, decode: seconds of a micro-batch: its images through the vision encoder; its rows through the decoder,
            forward and backward.
        update: seconds of clipping and AdamW. move: of moving the vision encoder to the device, where it is offloaded.
        encode_tflop, decode_tflop: TFLOP counted in the first two.
        peak: the most bytes that torch had reserved on the device; None where it does not say.
    """

    encode: float
    decode: float
    update: float
    move: float
    encode_tflop: float
    decode_tflop: float
    peak: int | None = None

    def micro_batches(self, workload: StepWorkload, micro_batch: int) -> tuple[int, int]:
        """Micro-batches of images and of rows in a step."""
        return math.ceil(workload.images / micro_batch), math.ceil(workload.examples / micro_batch)

    def seconds(self, workload: StepWorkload, micro_batch: int) -> float:
        """Seconds of a step."""
        images, rows = self.micro_batches(workload, micro_batch)
        return self.move + images * self.encode + rows * self.decode + self.update

    def speed(self, workload: StepWorkload, micro_batch: int) -> float:
        """TFLOP a second that a step achieves."""
        images, rows = self.micro_batches(workload, micro_batch)
        return (images * self.encode_tflop + rows * self.decode_tflop) / self.seconds(workload, micro_batch)


class RandomExamples(Dataset[Example]):
    """Examples of random tokens, each with an image of its own, all of one length."""

    def __init__(self, config: PaliGemmaConfig, workload: StepWorkload, count: int) -> None:
        self.config, self.workload, self.count = config, workload, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        config, generator = self.config, torch.Generator().manual_seed(index)
        images, tokens = config.num_image_tokens, self.workload.tokens
        ids = torch.full((tokens,), config.image_token_id)
        ids[images:] = torch.randint(config.image_token_id, (tokens - images,), generator=generator)
        answer = torch.arange(tokens) >= tokens - self.workload.supervised
        return {
            "input_ids": ids,
            "token_type_ids": answer.long(),
            "labels": ids.where(answer, IGNORE_INDEX),
            "pixel_values": torch.rand(config.pixel_shape, generator=generator) * 2 - 1,
            "id": str(index),
            "image_id": str(index),
        }


def images_per_step(steps: BatchSampler, image_ids: Sequence[str]) -> float:
    """How many different images a step is about, on average over the first steps of a run."""
    sampled = range(min(SAMPLED_STEPS, steps.total))
    images = ({image_ids[index] for index, _ in steps[step]} for step in sampled)
    return statistics.fmean(sum(map(names_image, of_step)) for of_step in images)


def time_step(
    run: RunConfig, model: PaliGemma, execution: ExecutionPlan, workload: StepWorkload, collate: Collate
) -> StepTime:
    """Time the phases of a step on the device of `model`, whose adapters are in place.

    Raises:
        ValueError: the device has less memory than the plan took it to have.
    """
    with tempfile.TemporaryDirectory() as directory:
        run = run.model_copy(update={"output": directory})
        rows = RandomExamples(model.config, workload, execution.micro_batch)
        steps = BatchSampler((len(rows),), len(rows), run.train.seed, 1)
        trainer = LoRATrainer(run, model, rows, steps, execution, collate, save_result=lambda _: None)
        try:
            return time_phases(trainer, [rows[index] for index in range(len(rows))])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"the device ran out of memory with {execution}, which should fit by the plan: close what else uses "
                "it, or lower memory.budget_gib"
            ) from error


def time_phases(trainer: LoRATrainer, rows: list[Example]) -> StepTime:
    device, total = trainer.args.device, sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
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
        trainer.accumulation.micro_step(rows, images, total, step=0)

    def update() -> None:
        norm = total_norm(trainer.accumulation.gradients())
        clip_gradients(trainer.trained.values(), trainer.run.train.max_grad_norm, norm)
        optimizer.step()

    moved, _ = median_time(move, device)
    with trainer.accumulation.vision_on_device():
        encoded, encode_tflop = median_time(encode, device)
    decoded, decode_tflop = median_time(decode, device)
    updated, _ = median_time(update, device)
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return StepTime(encoded, decoded, updated, moved, encode_tflop, decode_tflop, peak)


def median_time(phase: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds of a call, the median of REPEATS, and its TFLOP, counted in one call before them."""
    with flop_counter() as counter:
        phase()
    seconds = []
    for _ in progress_bar("timing a step", "time", range(REPEATS)):
        synchronize(device)
        start = time.perf_counter()
        phase()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), counter.get_total_flops() / TERA


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
