"""The optimizer of a run and its learning rate, also where a run resumes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from finetune.config.schema import TrainConfig


def make_optimizer(trained: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over what is trained."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(trained, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)


def set_schedule(schedule: object, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the learning rate to what the configuration's schedule gives after `step` steps, whatever it was before."""
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR), "the schedule exists from the start of training on"
    rates = [rate * factor(step) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule.load_state_dict(schedule.state_dict() | {"last_epoch": step, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def without_wrapper(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer that `make_optimizer` made, without the wrapper of accelerate."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer), "the optimizer exists from the start of training on"
    return optimizer
