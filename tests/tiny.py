"""Tiny random PaliGemmas for tests: the library's, run live as the reference, and the same weights on disk for ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PaliGemmaConfig as LibraryConfig
from transformers import PaliGemmaForConditionalGeneration

# The published 224 config's fields and omissions, at toy widths: 4 image tokens, grouped-query attention 4 to 1.
CONFIG: dict[str, Any] = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "hidden_size": 32,
    "image_token_index": 120,
    "model_type": "paligemma",
    "projection_dim": 32,
    "text_config": {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "model_type": "gemma",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_image_tokens": 4,
        "num_key_value_heads": 1,
        "vocab_size": 128,
    },
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 24,
        "image_size": 28,
        "intermediate_size": 48,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "patch_size": 14,
        "projection_dim": 32,
        "vision_use_head": False,
    },
    "vocab_size": 128,
}


def config(**changes: Any) -> dict[str, Any]:
    """CONFIG with changes, `vision__image_size=56` for nested fields."""
    result = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            result[f"{section}_config"][field] = value
        else:
            result[name] = value
    return result


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Non-trivial values everywhere: norms off identity, biases off zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            is_layer_norm = parameter.ndim == 1 and name.endswith("weight") and "vision" in name
            parameter.copy_(noise + 1.0 if is_layer_norm else noise)


def library_model(hf: dict[str, Any], seed: int = 0) -> PaliGemmaForConditionalGeneration:
    """The reference in fp32 with random weights."""
    model = PaliGemmaForConditionalGeneration(LibraryConfig(**copy.deepcopy(hf)))
    randomize(model, seed)
    model.tie_weights()
    return model.eval()


def save_library_model(model: PaliGemmaForConditionalGeneration, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def batch(
    hf: dict[str, Any], prompt_lengths: list[int], suffix_lengths: list[int] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random right-padded rows: image tokens, prompt_lengths[i] prefix tokens, suffix_lengths[i] suffix tokens."""
    generator = torch.Generator().manual_seed(seed)
    size, patch = hf["vision_config"]["image_size"], hf["vision_config"]["patch_size"]
    images = (size // patch) ** 2
    suffixes = suffix_lengths or [0] * len(prompt_lengths)
    width = images + max(p + s for p, s in zip(prompt_lengths, suffixes, strict=True))
    rows = len(prompt_lengths)
    ids = torch.zeros(rows, width, dtype=torch.long)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, (prompt, suffix) in enumerate(zip(prompt_lengths, suffixes, strict=True)):
        end = images + prompt + suffix
        ids[i, :images] = hf["image_token_index"]
        ids[i, images:end] = torch.randint(3, hf["image_token_index"], (prompt + suffix,), generator=generator)
        mask[i, :end] = 1
        types[i, images + prompt : end] = 1
        labels[i, images + prompt : end] = ids[i, images + prompt : end]
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "pixel_values": torch.rand(rows, 3, size, size, generator=generator) * 2 - 1,
    }
    if suffix_lengths:
        made["labels"] = labels
    return made


def rows_of(made: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The rows of a batch one by one, without their padding."""
    for i, length in enumerate(made["attention_mask"].sum(dim=1).tolist()):
        yield {name: t[i : i + 1] if name == "pixel_values" else t[i : i + 1, :length] for name, t in made.items()}
