"""SigLIP vision tower: a plain pre-norm ViT over 14-pixel patches (arXiv 2303.15343).

Module names are those of the published checkpoint. The attention-pooling head that some checkpoints carry is not used
by PaliGemma and is not here. What the tower returns is the last block after `post_layernorm`, and for connectors that
ask for it the means of groups of hidden states: h_0 is the patch embedding, h_i what block i gives out.

Axes: B images, C channels, H W pixels, N patches, D hidden, h heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import VisionConfig
from model.ops.attention import attention
from model.ops.linear import Conv2d, Linear


class SiglipEmbeddings(nn.Module):
    """Patches, linearly embedded, plus learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.patch_embedding = Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape[-2:])} pixels, this checkpoint takes "
                f"{self.image_size} x {self.image_size}: use its own processor"
            )
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (B, D, H/14, W/14)
        return x.flatten(2).transpose(1, 2) + self.position_embedding.weight  # (B, N, D)


class SiglipAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.out_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, N, D)


class SiglipMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipTransformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(config)
        layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, groups: Sequence[range] = ()) -> tuple[Tensor, list[Tensor]]:
        x, layers = self.embeddings(pixel_values), self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        # One sum a group, in fp32 at least, instead of every hidden state.
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in groups]
        for number, layer in enumerate(layers):
            sums = [s + x if number in group else s for s, group in zip(sums, groups, strict=True)]
            x = layer(x)
        means = [(s / len(group)).to(x.dtype) for s, group in zip(sums, groups, strict=True)]
        return self.post_layernorm(x), means


class SiglipVisionTower(nn.Module):
    """pixel_values float[B, C, H, W], normalised to [-1, 1] -> patch features [B, N, D] in the weights' dtype, and for
    each of `groups` the mean of its hidden states, [B, N, D] each.

    groups: numbers of hidden states below the number of layers.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_model = SiglipTransformer(config)

    def forward(self, pixel_values: Tensor, groups: Sequence[range] = ()) -> tuple[Tensor, list[Tensor]]:
        features: tuple[Tensor, list[Tensor]] = self.vision_model(pixel_values, groups)
        return features
