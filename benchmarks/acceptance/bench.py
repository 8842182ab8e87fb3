"""What the checks work on: networks with random weights made on the device, the library's and ours of the same tensors.

Nothing is read and little is written: an adapter, for PEFT to open, and the checkpoints of small trainings. The weights
of a dtype exist once, whatever the number of networks on them.

Axes: B rows, S tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import arms, side_by_side
from benchmarks.acceptance.card import Card
from data import collate
from finetune.adapters.storage import save_adapter
from finetune.lora.linear import LoRAConfig, inject_lora
from finetune.lora.protocol import trained_parameters
from model import IGNORE_INDEX, PaliGemma, PaliGemmaConfig
from model.checkpoint import canonical_name
from model.random_init import init_weights

FULL = PaliGemmaConfig()
SIZES = {
    "true": FULL,
    "small": dataclasses.replace(
        FULL,
        vision=dataclasses.replace(FULL.vision, num_hidden_layers=2),
        text=dataclasses.replace(FULL.text, num_hidden_layers=2),
    ),
    "tiny": side_by_side.TINY,
}
Example = dict[str, Any]


class Bench:
    """Device, dimensions, networks and data of a run.

    Args:
        card: where all of it is.
        size: a key of SIZES.
        directory: for the little that is written.
    """

    def __init__(self, card: Card, size: str, directory: Path) -> None:
        self.card, self.size, self.config, self.directory = card, size, SIZES[size], directory
        self.device = card.device
        self.weights: dict[torch.dtype, dict[str, Tensor]] = {}
        self.adapter: Path | None = None

    # Networks.

    def weights_in(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights in a dtype, cast from those in fp32; bf16 without these is drawn by itself, and costs no more."""
        if torch.float32 not in self.weights and dtype not in self.weights:
            drawn = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            self.weights = {drawn: self.draw(drawn)}  # what there was of others would not be the same weights
        if dtype not in self.weights:
            self.weights[dtype] = {name: t.to(dtype) for name, t in self.weights[torch.float32].items()}
        return self.weights[dtype]

    def draw(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh weights, norms and biases off their start, so that each of them counts."""
        generator = torch.Generator(self.device).manual_seed(0)
        model = PaliGemma.empty(self.config, dtype, self.device)
        init_weights(model, generator)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    noise = torch.randn(parameter.shape, generator=generator, device=self.device)
                    parameter.add_(noise.to(dtype), alpha=0.1)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    def keep_only(self, *dtypes: torch.dtype) -> None:
        """Have the weights in these dtypes, and in no others."""
        for dtype in dtypes:
            self.weights_in(dtype)
        self.weights = {dtype: weights for dtype, weights in self.weights.items() if dtype in dtypes}
        self.release()

    def ours(self, dtype: torch.dtype) -> PaliGemma:
        """Our network, in evaluation mode, nothing trained."""
        with torch.device("meta"):
            model = PaliGemma(self.config)
        model.load_state_dict(self.weights_in(dtype), assign=True)
        return model.eval().requires_grad_(False)

    def library(self, dtype: torch.dtype) -> Any:
        """The library's network on the same tensors, in evaluation mode."""
        from transformers import PaliGemmaConfig as LibraryConfig
        from transformers import PaliGemmaForConditionalGeneration

        published = self.config.to_hf(dtype)
        with torch.device("meta"):
            model: Any = PaliGemmaForConditionalGeneration(LibraryConfig(**published))
        weights = self.weights_in(dtype)
        for name, _ in list(model.named_parameters()):
            known = canonical_name(name)
            assert known is not None, f"the library has a parameter {name}, which no checkpoint has"
            put(model, name, nn.Parameter(weights[known], requires_grad=False))
        model.tie_weights()
        # Buffers depend on the dimensions alone: they come from the same network without layers, which costs little.
        shallow = without_layers(published)
        buffers = dict(PaliGemmaForConditionalGeneration(LibraryConfig(**shallow)).named_buffers())
        for name, _ in list(model.named_buffers()):
            put(model, name, buffers[name].to(self.device))
        left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        assert not left, f"no values for {left}"
        return model.eval()

    def adapted(self, dtype: torch.dtype, dropout: float = 0.0) -> PaliGemma:
        """Our network with adapters off their start on all language linears; in fp64 the adapters are, too."""
        model = self.ours(dtype)
        inject_lora(model, LoRAConfig(rank=arms.RANK, alpha=arms.RANK, dropout=dropout))
        side_by_side.randomize_adapters(model, self.device)
        if dtype == torch.float64:
            for parameter in trained_parameters(model).values():
                parameter.data = parameter.data.double()
        return model

    def adapter_directory(self) -> Path:
        """The adapters of `adapted`, on disk, for PEFT."""
        if self.adapter is None:
            save_adapter(self.adapted(torch.bfloat16), self.directory / "adapter")
            self.adapter = self.directory / "adapter"
        return self.adapter

    # Data.

    def examples(self, count: int) -> list[Example]:
        """Rows of different lengths and answers, two questions to an image."""
        config, generator = self.config, torch.Generator().manual_seed(0)
        images = config.num_image_tokens
        made: list[Example] = []
        for index in range(count):
            prefix, suffix = 8 + 5 * (index % 3), 2 + index % 4
            ids = torch.full((images + prefix + suffix,), config.image_token_id)
            words = min(config.image_token_id, 256_000)
            ids[images:] = torch.randint(3, words, (prefix + suffix,), generator=generator)
            answer = torch.arange(len(ids)) >= images + prefix
            image = torch.Generator().manual_seed(index // 2)
            made.append(
                {
                    "input_ids": ids,
                    "token_type_ids": answer.long(),
                    "labels": ids.where(answer, IGNORE_INDEX),
                    "pixel_values": torch.rand(config.pixel_shape, generator=image) * 2 - 1,
                    "id": str(index),
                    "image_id": str(index // 2),
                }
            )
        return made

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Right-padded tensors [B, S] on the device, pixels too."""
        made = collate(examples, self.config.pad_token_id)
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def scratch(self) -> Path:
        """A new empty directory."""
        return Path(tempfile.mkdtemp(dir=self.directory))

    def release(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        self.card.empty_cache()


def gradients_of(trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients there are; taken away from the parameters."""
    found = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    for parameter in trained.values():
        parameter.grad = None
    return found


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter or buffer in the place of the one of that name."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)


def without_layers(published: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with no layers, and next to no vocabulary."""
    few = {"num_hidden_layers": 0, "intermediate_size": 8}
    text = {**published["text_config"], **few, "vocab_size": 8}
    vision = {**published["vision_config"], **few}
    return {**published, "text_config": text, "vision_config": vision, "vocab_size": 8, "image_token_index": 3}
