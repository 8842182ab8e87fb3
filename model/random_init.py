"""A network with seeded initial weights, to train from scratch: how the tiny base was made."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import PaliGemmaConfig
from model.connectors import Latents
from model.layers import RMSNorm
from model.paligemma import PaliGemma


def from_random(
    directory: str | Path, seed: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PaliGemma:
    """A network of the dimensions in `directory/config.json`, with weights drawn from `seed` instead of read."""
    model = PaliGemma.empty(PaliGemmaConfig.from_directory(Path(directory)), dtype, device)
    init_weights(model, torch.Generator(device).manual_seed(seed))
    model.source = Path(directory)
    return model.eval()


def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Initial values for training from scratch: LeCun-normal products, embeddings of std D^-1/2, identity norms."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5, generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5, generator=generator)
        elif isinstance(module, Latents):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, RMSNorm):
            nn.init.zeros_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)
