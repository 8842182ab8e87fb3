"""The trainer on networks that are in memory: short runs on made-up examples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.acceptance.bench import Bench, Example, gradients_of
from data import collate
from finetune.config.schema import RunConfig
from finetune.lora.protocol import trained_parameters
from finetune.training.batch_sampler import BatchSampler
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.trainer import LoRATrainer
from model import PaliGemma

LEARNING_RATE, BETAS, MAX_GRAD_NORM = 1e-3, (0.9, 0.999), 1.0


class Examples(Dataset[Example]):
    """Examples by the (index, epoch) pairs of `BatchSampler`."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, pair: tuple[int, int]) -> Example:
        return self.examples[pair[0]]


class RecordingTrainer(LoRATrainer):
    """Keeps the loss of each step as it is."""

    losses: list[Tensor]

    def training_step(self, *inputs: Any, **named: Any) -> Tensor:
        loss = super().training_step(*inputs, **named)
        self.losses.append(loss)
        return loss

    @property
    def curve(self) -> Tensor:
        return torch.stack(self.losses).double()


def make_trainer(
    bench: Bench,
    model: PaliGemma,
    examples: Sequence[Example],
    execution_plan: ExecutionPlan,
    output: Path,
    batch_size: int | None = None,
    steps: int = 1,
    **settings: Any,
) -> RecordingTrainer:
    """A trainer of `model`, with a constant rate; `settings` are those of the configuration's section `train`.

    batch_size: examples of a step; all of them by default.
    """
    size = batch_size or len(examples)
    never = 10**6
    train = {"max_steps": steps, "batch_size": size, "learning_rate": LEARNING_RATE, "schedule": "constant"}
    train |= {"beta1": BETAS[0], "beta2": BETAS[1], "max_grad_norm": MAX_GRAD_NORM, "warmup": 0.0}
    train |= {"log_every": never, "save_every": never, **settings}
    run = RunConfig.model_validate(
        {
            "model": {"path": "made in memory", "dtype": "float32", "device": str(bench.device)},
            "data": {"train": {"jsonl": "made in memory"}, "workers": 0},
            "train": train,
            "output": str(output),
        }
    )
    data, pad = Examples(examples), bench.config.pad_token_id
    trainer = RecordingTrainer(
        run,
        model,
        data,
        BatchSampler((len(examples),), size, 0, steps),
        execution_plan,
        partial(collate, pad_id=pad),
        save_result=lambda _: None,
        save_checkpoints="save_every" in settings,
    )
    trainer.losses = []
    trainer._initial_global_step = 0
    return trainer


def step_gradients(
    bench: Bench, dtype: torch.dtype, execution_plan: ExecutionPlan, examples: Sequence[Example], dropout: float = 0.0
) -> dict[str, Tensor]:
    """The gradients of one step of the trainer, by parameter."""
    model = bench.adapted(dtype, dropout)
    trainer = make_trainer(bench, model, examples, execution_plan, bench.scratch())
    trainer.training_step(trainer.network, list(examples))
    return gradients_of(trained_parameters(model))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of libraries, which would come between the lines of the findings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
