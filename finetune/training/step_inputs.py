"""What the network gets of a step's examples: its images, encoded once each, and its micro-batches.

A micro-batch is of rows with images, or of rows of text alone. Not here: what is made of them
(gradient_accumulation.py, objective.py).

Axes: B rows of a micro-batch, I images of a step, N image tokens, D hidden.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.lora.dropout import seed_of
from finetune.lora.protocol import set_dropout_seeds
from finetune.system.transfer import to_device
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.offload import Offload
from model import PaliGemma, PaliGemmaConfig, TokenBatch

Example = dict[str, Any]
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


class StepInputs:
    """Makes the network's inputs of examples.

    Args:
        network: on its device, adapters in place.
        seed: of the run's dropout.
        execution_plan: how a step is cut, and where the vision tower is.
        collate: examples -> right-padded tensors.
    """

    def __init__(self, network: PaliGemma, seed: int, execution_plan: ExecutionPlan, collate: Collate) -> None:
        self.network, self.seed = network, seed
        self.execution_plan, self.collate = execution_plan, collate
        self.device = network.device
        self.offload = Offload(network.vision_tower, self.device) if execution_plan.offload_vision else None

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
        """What `inputs_of` moves of a micro-batch's images: nothing of rows of text alone."""
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

    def vision_on_device(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the vision encoder is on the device, also where the plan keeps it in host memory."""
        return self.offload.on_device() if self.offload else contextlib.nullcontext()

    def dropout_seeds(self, names: Sequence[str], step: int) -> Tensor:
        """i32 [B]: what the dropout of each row is drawn from: seed, step and record or image, nothing else."""
        return torch.tensor([seed_of(self.seed, step, name) for name in names], dtype=torch.int32)

    def views_of(self, images: Iterable[str]) -> list[str]:
        """Names of what passes the vision tower: of images, or of the tiles of each and the whole."""
        views = self.network.config.views
        return list(images) if views == 1 else [f"{name} {view}" for name in images for view in range(views)]


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


def is_trained(module: nn.Module) -> bool:
    """Whether anything in a module is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def frozen_shapes(config: PaliGemmaConfig, groups: Sequence[range], connects: bool) -> list[tuple[int, ...]]:
    """Of one image, the shapes of `ImageFeatures.states`: of its tokens, or of what the connector takes."""
    if connects:
        return [(config.num_image_tokens, config.text.hidden_size)]
    return [(config.views, config.vision.num_patches, config.vision.hidden_size)] * (1 + len(groups))
