"""What the Hugging Face Trainer is told: the schedule, clipping, and when to log, evaluate and save."""

from __future__ import annotations

import math

import torch
from transformers import TrainingArguments

from finetune.config.schema import RunConfig, TrainConfig
from finetune.training.batch_sampler import BatchSampler

MOST_EVALUATIONS = 20  # of a run, where it is left to us


class Arguments(TrainingArguments):
    """The Trainer's arguments, but that the Trainer leaves the model where it is: by itself it would bring an offloaded
    vision encoder back to the device.
    """

    @property
    def place_model_on_device(self) -> bool:
        return False


def evaluation_interval(train: TrainConfig, steps: BatchSampler) -> int | None:
    """Steps between evaluations; None: there are none during training."""
    if train.eval_every != "auto":
        return train.eval_every
    epoch = math.ceil(steps.num_records / steps.batch_size)
    return min(steps.total, max(epoch, math.ceil(steps.total / MOST_EVALUATIONS)))


def training_arguments(
    config: RunConfig, steps: BatchSampler, device: torch.device, evaluates: bool, saves: bool
) -> TrainingArguments:
    """The Trainer's arguments for these steps. evaluates, saves: whether it evaluates and writes checkpoints.

    Raises:
        ValueError: several devices are visible to one process.
    """
    train, total = config.train, steps.total
    interval = evaluation_interval(train, steps) if evaluates else None
    schedules = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
    arguments = Arguments(
        output_dir=config.output,
        max_steps=total,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=schedules[train.schedule],
        warmup_steps=round(train.warmup * total),
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saves else "no",
        save_steps=train.save_every,
        eval_strategy="steps" if interval else "no",
        eval_steps=interval,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} devices are visible, and this is one process: choose one with "
            "CUDA_VISIBLE_DEVICES=0, or use all with accelerate launch --multi_gpu train.py ..."
        )
    arguments.mixed_precision = "no"  # not the launcher's: model.dtype is what is computed in
    return arguments
