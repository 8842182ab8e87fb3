"""Where a loss or gradient that is not finite comes from: the module or parameter where it appears first."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from finetune.system import sharding
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.step_inputs import Example


def first_not_finite(
    accumulation: GradientAccumulation, examples: list[Example], total: float, step: int
) -> tuple[str | None, list[str]]:
    """Where the first value that is not finite appears, if one does, and the ids of the examples of its micro-batch.

    The step is computed again for that; its gradients are dropped. Processes with sharded layers call this together.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    modules = accumulation.network.named_modules()
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in modules if name]
    images = accumulation.frozen_image_features(examples)
    for micro_batch, counts in accumulation.lockstep_micro_batches(examples):
        accumulation.micro_step(micro_batch, images, total, step, counts)
        trained = reversed(list(accumulation.trained.items()))
        # The backward pass comes from the end: the last parameter's gradient is the first one.
        for name, parameter in trained:
            if parameter.grad is not None and not sharding.local(parameter.grad).isfinite().all():
                found.append(f"the gradient of {name}")
        if sharding.any_process(bool(found)):
            examples = micro_batch
            break
    for hook in hooks:
        hook.remove()
    accumulation.network.zero_grad()
    return next(iter(found), None), [example["id"] for example in examples]
