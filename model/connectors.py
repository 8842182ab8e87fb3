"""Vision -> language: PaliGemma's connector is one linear map (arXiv 2407.07726, section 3.1).

Axes: B images, N patches, D vision hidden, E text hidden.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.config import PaliGemmaConfig
from model.ops.linear import Linear


class LinearConnector(nn.Module):
    """Vision features [B, N, D] -> image tokens [B, N, E]."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.linear = Linear(config.vision.hidden_size, config.text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.linear(features)
        return tokens
