"""What a step minimises: a sum over its examples, divided by what they count together.

Training from answers is here (`Supervised`), from pairs in preferences.py, by rewards in rewards.py. As a sum, a step
can be cut into micro-batches and shared by processes without another result: each loss is divided by the total of the
whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from finetune.training.step_inputs import Example, StepInputs
from model import IGNORE_INDEX, PaliGemma, TokenBatch

EXAMPLES = "examples"  # among the figures of a loss: how many they are summed over


class Loss(NamedTuple):
    """Of a micro-batch its share of the step's loss, and further figures, none or with `EXAMPLES` among them: each a
    sum over the examples, f32 [] on the device, without a graph.
    """

    value: Tensor
    figures: Mapping[str, Tensor]


class Objective(Protocol):
    """What training minimises."""

    @property
    def may_be_silent(self) -> bool:
        """Whether there may be steps whose gradient is zero everywhere, because nothing is to be learned from them."""

    def prepare(self, inputs: StepInputs, examples: Sequence[Example], step: int) -> list[Example]:
        """The examples of a step (counted from 0), or of a process's share of it, with what their loss needs besides.

        Raises:
            ValueError: an example lacks it.
        """

    def total(self, examples: Sequence[Example]) -> float:
        """What these count, by which the loss of a step is divided."""

    def loss(
        self,
        network: PaliGemma,
        batch: TokenBatch,
        image_features: Tensor | None,
        examples: Sequence[Example],
        total: float,
    ) -> Loss:
        """Of a micro-batch, in the order of its rows.

        Args:
            batch: its tokens, on the device.
            image_features: of each row, [B, N, D].
            total: of the whole step, over all processes.
        """

    def measure(self, inputs: StepInputs) -> dict[str, float]:
        """What an evaluation finds beside the answers: figures of the validation examples, `loss` perhaps among them.
        All processes call this.
        """


class Supervised:
    """The cross-entropy of the answers' tokens, each as often as its weight says."""

    may_be_silent: ClassVar[bool] = False

    def prepare(self, inputs: StepInputs, examples: Sequence[Example], step: int) -> list[Example]:
        """See `Objective.prepare`."""
        return list(examples)

    def total(self, examples: Sequence[Example]) -> float:
        """Supervised tokens; those with weights count as much as these say."""
        return supervised(examples)

    def loss(
        self,
        network: PaliGemma,
        batch: TokenBatch,
        image_features: Tensor | None,
        examples: Sequence[Example],
        total: float,
    ) -> Loss:
        """See `Objective.loss`."""
        loss = network(batch=batch, image_features=image_features, num_items_in_batch=total).loss
        return Loss(loss, {})

    def measure(self, inputs: StepInputs) -> dict[str, float]:
        """Nothing: see `Objective.measure`."""
        return {}


def supervised(examples: Sequence[Example]) -> float:
    """Supervised tokens of a step, by which its loss is divided; those with weights count as much as these say."""
    total = 0.0
    for example in examples:
        tokens = example["labels"] != IGNORE_INDEX
        total += float(example["loss_weights"][tokens].double().sum() if "loss_weights" in example else tokens.sum())
    return total


def require_examples(batch: Sequence[Any]) -> None:
    """Raise the error that stands for an example which cannot be made, where a batch holds one."""
    if error := next((example for example in batch if isinstance(example, Exception)), None):
        if isinstance(error, MemoryError):
            raise ValueError("the machine has no memory left to prepare examples: lower data.workers") from error
        raise error
