"""Loss and gradients of an effective batch, micro-batch by micro-batch.

A step is cut into micro-batches, whose inputs step_inputs.py makes, and every loss is divided by what the examples of
the whole step count, so that the gradient does not depend on the cut. For answers those are their supervised tokens;
where these have weights, as in rows of several answers, the sum of the weights. What is minimised is the objective's
business (objective.py).

Examples without any image give what is trained before the decoder a gradient of zeros: AdamW then only decays its
moments, and all processes sum the same gradients.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.config.schema import TrainConfig
from finetune.system import sharding
from finetune.system.device import first_line, free_memory, is_out_of_memory
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.objective import Objective, Supervised
from finetune.training.step_inputs import Collate, Example, ImageFeatures, StepInputs, has_image, micro_batches
from model import PaliGemma

Made = TypeVar("Made")


class GradientAccumulation(StepInputs):
    """Forward and backward passes of a step.

    Args:
        network: on its device, adapters in place, the rest frozen.
        trained: the parameters that get gradients, by name.
        config: the section `train` of the run.
        execution_plan: how a step is cut, and what is recomputed.
        collate: examples -> right-padded tensors.
        objective: what is minimised.

    Attributes:
        figures: of the examples accumulated last, as `Loss` has them.
    """

    def __init__(
        self,
        network: PaliGemma,
        trained: Mapping[str, nn.Parameter],
        config: TrainConfig,
        execution_plan: ExecutionPlan,
        collate: Collate,
        objective: Objective | None = None,
    ) -> None:
        super().__init__(network, config.seed, execution_plan, collate)
        self.trained, self.config = trained, config
        self.objective = objective or Supervised()
        self.figures: dict[str, Tensor] = {}
        network.language_model.model.set_recompute(execution_plan.recompute_layers)

    def accumulate_in_memory(self, examples: list[Example], total: float, step: int) -> Tensor:
        """`accumulate`, as `in_memory` does it."""
        return self.in_memory(partial(self.accumulate, examples, total, step), step)

    def in_memory(self, work: Callable[[], Made], step: int) -> Made:
        """Work on a step, repeated with half the micro-batch where the device runs out of memory, if the plan chose it.

        Processes that share sharded layers repeat it together.

        Raises:
            ValueError: out of memory, and the micro-batch is the configuration's, or one row already.
        """
        while True:
            try:
                with sharding.same_memory(self.network.language_model.model):
                    return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            self.network.zero_grad()
            free_memory(self.device)
            self.halve_micro_batch(reason, step)

    def accumulate(self, examples: list[Example], total: float, step: int) -> Tensor:
        """Add up the gradients of these examples; returns their share of the mean loss.

        total: of the whole step, as `Objective.total` counts it. step: its number, counted from 0.
        """
        images = self.frozen_image_features(examples)
        loss, self.figures = torch.zeros((), device=self.device), {}
        for micro_batch, counts in self.lockstep_micro_batches(examples):
            loss += self.micro_step(micro_batch, images, total, step, counts)
        if not any(map(has_image, examples)):
            fill_gradients(self.network.vision_tower, self.network.multi_modal_projector)
        return loss

    def lockstep_micro_batches(self, examples: Sequence[Example]) -> Iterator[tuple[list[Example], bool]]:
        """The micro-batches of a step, and whether each counts. Processes that share sharded layers have equally many:
        one that has fewer repeats an example, which does not count.
        """
        own = list(micro_batches(examples, self.execution_plan.micro_batch))
        missing = sharding.meet(len(own)) - len(own)
        yield from ((micro_batch, True) for micro_batch in own)
        yield from ((own[-1][-1:], False) for _ in range(missing))

    def micro_step(
        self,
        micro_batch: Sequence[Example],
        images: ImageFeatures | None,
        total: float,
        step: int,
        counts: bool = True,
    ) -> Tensor:
        """Forward and backward pass of a micro-batch; returns its share of the loss of a step. One that does not count
        adds zero to gradients and loss.
        """
        batch, image_features = self.inputs_of(micro_batch, images, step)
        found = self.objective.loss(self.network, batch, image_features, micro_batch, total)
        loss: Tensor = found.value if counts else 0 * found.value
        loss.backward()
        if counts:
            self.figures |= {name: self.figures.get(name, 0) + figure for name, figure in found.figures.items()}
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        """Of what is trained. Which parameters have one depends on the network alone, not on the examples."""
        return [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]

    def unsummed_gradients(self) -> list[Tensor]:
        """Of what is trained and not sharded; those of sharded parameters were summed in the backward pass."""
        return [gradient for gradient in self.gradients() if not isinstance(gradient, DTensor)]

    def halve_micro_batch(self, reason: str, step: int) -> None:
        """Halve the micro-batch of this step and those after it, out of memory for a `reason`.

        Raises:
            ValueError: the configuration sets the micro-batch, or it has one row.
        """
        rows = self.execution_plan.micro_batch
        if self.config.micro_batch != "auto" or rows == 1:
            raise ValueError(
                f"out of memory in step {step + 1} with micro-batches of {rows} ({reason}): set "
                "train.micro_batch=auto or less, train.recompute=auto or more, or close what else uses the device"
            )
        warnings.warn(
            f"out of memory in step {step + 1} ({reason}): repeated, and from here on cut into micro-batches of "
            f"{rows // 2} instead of {rows}",
            stacklevel=2,
        )
        self.execution_plan = dataclasses.replace(self.execution_plan, micro_batch=rows // 2)


def fill_gradients(*modules: nn.Module) -> None:
    """Zeros as the gradient of each trained parameter that has none."""
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
