"""The optimizer of a run, the norm that its gradients are clipped by, and its learning rate, also where a run resumes.

Sharded and whole parameters have groups of their own: torch does not compute with both in one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from finetune.config.schema import RunConfig
from finetune.lora.config import SCOPES
from finetune.system.distributed import whole


def make_optimizer(trained: Mapping[str, nn.Parameter], run: RunConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over what is trained, by name; the connector with a learning rate of its own."""
    config, rate = run.train, run.connector.learning_rate
    groups: list[dict[str, object]] = []
    for in_connector in (False, True):
        parameters = [p for name, p in trained.items() if name.startswith(SCOPES["connector"]) == in_connector]
        own = {"lr": rate} if in_connector and rate is not None else {}
        groups += [{"params": group, **own} for group in whole_and_sharded(parameters)]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, the shards of other processes included; all processes call this."""
    norms = [whole(get_total_norm(group)) for group in whole_and_sharded(gradients)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients, whose `total_norm` is `norm`, in place to one of at most `max_norm`."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    for group in whole_and_sharded(with_gradient):
        clip_grads_with_norm_(group, max_norm, norm)


def whole_and_sharded(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in at most two groups: those that a process holds whole, and those it has a shard of."""
    groups = [[tensor for tensor in tensors if isinstance(tensor, DTensor) == sharded] for sharded in (False, True)]
    return [group for group in groups if group]


def set_schedule(schedule: object, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the learning rate to what the configuration's schedule gives after `step` steps."""
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
