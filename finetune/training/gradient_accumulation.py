"""Loss and gradients of an effective batch, micro-batch by micro-batch.

The images of a step are encoded first, each once. The examples are then cut into micro-batches, and every loss is
divided by what the examples of the whole step count, so that the gradient does not depend on the cut. For answers those
are their supervised tokens; where these have weights, as in rows of several answers, the sum of the weights. What is
minimised is the objective's business (objective.py).

A micro-batch is of rows with images, or of rows of text alone. Examples without any image give what is trained before
the decoder a gradient of zeros: AdamW then only decays its moments, and all processes sum the same gradients.

Axes: B rows of a micro-batch, I images of a step, N image tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.config.schema import TrainConfig
from finetune.lora.dropout import seed_of
from finetune.lora.protocol import set_dropout_seeds
from finetune.system import sharding
from finetune.system.device import first_line, free_memory, is_out_of_memory
from finetune.system.transfer import to_device
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.objective import Example, Objective, Supervised
from finetune.training.offload import Offload
from model import PaliGemma, PaliGemmaConfig, TokenBatch

Collate = Callable[[Sequence[Example]], dict[str, Tensor]]
TEXTS = ("input_ids", "token_type_ids", "labels", "loss_weights")  # of an example, what a micro-batch collates


@dataclasses.dataclass(frozen=True)
class ImageFeatures:
    """What does not depend on what is trained of a step's images, and in which row that of an image id is: image tokens
    [I, N, D]; or, where the connector is trained, what it takes (`PaliGemma.vision_features`).
    """

    rows: dict[str, int]
    states: list[Tensor]
    connected: bool
    """Whether the connector has made tokens of them."""


class Inputs(NamedTuple):
    """Of a micro-batch its tokens, on the device, and the image tokens of each row, [B, N, D]; None of rows of text."""

    batch: TokenBatch
    image_features: Tensor | None


class GradientAccumulation:
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
        self.network, self.trained, self.config = network, trained, config
        self.execution_plan, self.collate = execution_plan, collate
        self.objective = objective or Supervised()
        self.figures: dict[str, Tensor] = {}
        self.device = network.device
        self.offload = Offload(network.vision_tower, self.device) if execution_plan.offload_vision else None
        network.language_model.model.set_recompute(execution_plan.recompute_layers)

    def accumulate_in_memory(self, examples: list[Example], total: float, step: int) -> Tensor:
        """`accumulate`, repeated with half the micro-batch where the device runs out of memory, if the plan chose it.

        Processes that share sharded layers repeat it together.

        Raises:
            ValueError: out of memory, and the micro-batch is the configuration's, or one row already.
        """
        while True:
            try:
                with sharding.same_memory(self.network.language_model.model):
                    return self.accumulate(examples, total, step)
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

    def inputs_of(self, micro_batch: Sequence[Example], images: ImageFeatures | None, step: int) -> Inputs:
        """What the network gets of a micro-batch; dropout is set to that of its rows in this step.

        All that it needs is worked out on the host and moved in one copy: nothing in it waits for the device.
        """
        texts = self.collate([{name: row[name] for name in TEXTS if name in row} for row in micro_batch])
        batch = TokenBatch.of(self.network.config.image_token_id, **texts)
        inputs = {**batch.tensors(), "dropout": self.dropout_seeds([example["id"] for example in micro_batch], step)}
        inputs |= self.image_inputs(micro_batch, images, step)
        moved = to_device(inputs, self.device)
        set_dropout_seeds(self.network.language_model, moved["dropout"])
        set_dropout_seeds(self.network.vision_tower, moved.get("image_dropout"))
        set_dropout_seeds(self.network.multi_modal_projector, moved.get("image_dropout"))
        encoded = self.image_tokens(moved, images)[moved["image_rows"]] if "image_rows" in moved else None
        batch = dataclasses.replace(batch, **{name: moved[name] for name in batch.tensors()})
        return Inputs(batch, encoded)

    def image_inputs(
        self, micro_batch: Sequence[Example], frozen: ImageFeatures | None, step: int
    ) -> dict[str, Tensor]:
        """What `micro_step` moves of a micro-batch's images: nothing of rows of text alone."""
        pixels = unique_images(micro_batch)
        if not pixels:
            return {}
        rows = frozen.rows if frozen and frozen.connected else {name: row for row, name in enumerate(pixels)}
        inputs = {"image_rows": torch.tensor([rows[example["image_id"]] for example in micro_batch])}
        if frozen is None or not frozen.connected:
            known = torch.tensor([frozen.rows[name] for name in pixels]) if frozen else None
            inputs["images"] = torch.stack(list(pixels.values())) if known is None else known
            inputs["image_dropout"] = self.dropout_seeds(self.views_of(pixels), step)
        return inputs

    def image_tokens(self, inputs: Mapping[str, Tensor], frozen: ImageFeatures | None) -> Tensor:
        """Image tokens [I, N, D]: all that are frozen, or those of a micro-batch's images, of which `inputs` has the
        pixels or the rows among what is frozen.
        """
        if frozen is None:
            return self.network.encode_images(inputs["images"])
        if frozen.connected:
            return frozen.states[0]
        return self.network.connect([states[inputs["images"]] for states in frozen.states])

    def frozen_image_features(self, examples: Sequence[Example]) -> ImageFeatures | None:
        """What is the same for a whole step of each of its images, computed once and without a graph: image tokens, or
        what a connector that is trained takes; None where the vision tower is trained.
        """
        network = self.network
        if is_trained(network.vision_tower):
            return None
        pixels, size = unique_images(examples), self.execution_plan.micro_batch
        connects = not is_trained(network.multi_modal_projector)
        states = [
            torch.empty(len(pixels), *shape, dtype=network.dtype, device=self.device)
            for shape in frozen_shapes(network.config, network.multi_modal_projector.groups, connects)
        ]
        with torch.no_grad(), self.vision_on_device() if pixels else contextlib.nullcontext():
            for number, images in enumerate(cut(list(pixels.values()), size)):
                features = network.vision_features(to_device({"pixels": torch.stack(images)}, self.device)["pixels"])
                rows = slice(number * size, number * size + len(images))
                for state, found in zip(states, [network.connect(features)] if connects else features, strict=True):
                    state[rows] = found
        return ImageFeatures({name: row for row, name in enumerate(pixels)}, states, connects)

    def vision_on_device(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the vision encoder is on the device, also where the plan keeps it in host memory."""
        return self.offload.on_device() if self.offload else contextlib.nullcontext()

    def dropout_seeds(self, names: Sequence[str], step: int) -> Tensor:
        """i32 [B]: what the dropout of each row is drawn from: seed, step and record or image, nothing else."""
        return torch.tensor([seed_of(self.config.seed, step, name) for name in names], dtype=torch.int32)

    def views_of(self, images: Iterable[str]) -> list[str]:
        """Names of what passes the vision tower: of images, or of the tiles of each and the whole."""
        views = self.network.config.views
        return list(images) if views == 1 else [f"{name} {view}" for name in images for view in range(views)]

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


def is_trained(module: nn.Module) -> bool:
    """Whether anything in a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def frozen_shapes(config: PaliGemmaConfig, groups: Sequence[range], connects: bool) -> list[tuple[int, ...]]:
    """Of one image, the shapes of `ImageFeatures.states`: of its tokens, or of what the connector takes."""
    if connects:
        return [(config.num_image_tokens, config.text.hidden_size)]
    return [(config.views, config.vision.num_patches, config.vision.hidden_size)] * (1 + len(groups))


def micro_batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Examples in micro-batches of at most `size`: alike in length, questions of one image side by side; rows with
    images first, then those of text alone, never both in one.
    """
    longest: dict[str, int] = {}
    for example in examples:
        longest[example["image_id"]] = max(longest.get(example["image_id"], 0), len(example["input_ids"]))
    ordered = sorted(examples, key=lambda e: (-longest[e["image_id"]], e["image_id"], -len(e["input_ids"])))
    for of_images in (True, False):
        yield from cut([example for example in ordered if has_image(example) == of_images], size)


def cut(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def unique_images(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pixels by image id, each image once."""
    return {example["image_id"]: example["pixel_values"] for example in examples if has_image(example)}


def has_image(example: Mapping[str, Any]) -> bool:
    """Whether an example, or a batch of them, is not of text alone."""
    return "pixel_values" in example


def fill_gradients(*modules: nn.Module) -> None:
    """Zeros as the gradient of each trained parameter that has none."""
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
