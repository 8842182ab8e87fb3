"""Vision -> language: what becomes of the vision tower's features before the decoder sees them.

PaliGemma's own connector is one linear map (arXiv 2407.07726, section 3.1). The others replace it, and start from it
where they can, so that a network with a new connector begins as the pretrained one and not as noise:

    linear          W f + b
    mlp             two layers that give the same at the start: x = gelu(x) - gelu(-x)
    dense_sci       W f + b and, of two earlier hidden states, W1 LN(h) each (Dense Connector, arXiv 2405.13800)
    dense_dci       the same with the means of two groups of hidden states that together are all but the last two
    resampler       learned queries attend to the features (perceiver of Idefics2, arXiv 2405.02246, section 3.2), then
                    W x + b: fewer tokens; cannot start as the pretrained projector, needs training on its own first
    pixel_shuffle   the features of a square of patches side by side, then one linear map (Idefics3, arXiv 2408.12637);
                    starts as the mean of what the projector made of them; needs training on its own first

Axes: B images, N patches, D vision hidden, M image tokens of an image, E text hidden, L vision layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import PaliGemmaConfig
from model.ops.attention import attention
from model.ops.linear import Linear


class Connector(nn.Module):
    """Vision features [B, N, D], and the mean of each of its `groups`, [B, N, D] -> image tokens [B, M, E].

    Attributes:
        groups: numbers of the hidden states whose means it takes as well, group by group.
    """

    groups: tuple[range, ...] = ()

    def start_from(self, projector: Linear) -> None:
        """Take values from the published projector, [E, D], as far as that determines them."""
        raise NotImplementedError


class LinearConnector(Connector):
    """W f + b."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.linear = Linear(config.vision.hidden_size, config.text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.linear(features)
        return tokens

    def start_from(self, projector: Linear) -> None:
        copy(projector, self.linear)


class MLPConnector(Connector):
    """W2 gelu(W1 f + b1) + b2, hidden width 2 E. At the start W1 = [W; -W] and W2 = [I, -I]: W f + b up to rounding."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        width = config.text.hidden_size
        self.linear_1 = Linear(config.vision.hidden_size, 2 * width)
        self.linear_2 = Linear(2 * width, width)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.linear_2(F.gelu(self.linear_1(features), approximate="tanh"))
        return tokens

    def start_from(self, projector: Linear) -> None:
        identity = torch.eye(projector.out_features, dtype=projector.weight.dtype, device=projector.weight.device)
        self.linear_1.weight.copy_(torch.cat([projector.weight, -projector.weight]))
        self.linear_1.bias.copy_(torch.cat([projector.bias, -projector.bias]))
        self.linear_2.weight.copy_(torch.cat([identity, -identity], dim=1))
        self.linear_2.bias.zero_()


class DenseConnector(Connector):
    """W f + b + sum over groups g of W_g LN_g(mean of the group's hidden states).

    The paper's formula is one product with the features side by side, [W, W_1, W_2] [f; g_1; g_2] + b: the same sum,
    taken as separate products here, so that with W_g = 0 the network is the pretrained one bit for bit. W_g gets a
    gradient nevertheless. Differs from the paper, which drops the last block and `post_layernorm`, and trains a fresh
    MLP.
    """

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        vision, width = config.vision, config.text.hidden_size
        self.groups = dense_groups(config.connector.kind, vision.num_hidden_layers)
        self.linear = Linear(vision.hidden_size, width)
        self.group_norms = nn.ModuleList(nn.LayerNorm(vision.hidden_size, vision.layer_norm_eps) for _ in self.groups)
        self.group_linears = nn.ModuleList(Linear(vision.hidden_size, width, bias=False) for _ in self.groups)

    def forward(self, features: Tensor, *means: Tensor) -> Tensor:
        tokens: Tensor = self.linear(features)
        for norm, linear, mean in zip(self.group_norms, self.group_linears, means, strict=True):
            tokens = tokens + linear(norm(mean))
        return tokens

    def start_from(self, projector: Linear) -> None:
        copy(projector, self.linear)
        for linear in self.group_linears:
            nn.init.zeros_(linear.get_parameter("weight"))


def dense_groups(kind: str, layers: int) -> tuple[range, ...]:
    """The groups of hidden states h_0 .. h_L: of SigLIP's 27 layers h_7 and h_15, or h_0 .. h_12 and h_13 .. h_25 (the
    paper's); of others the same shares.

    >>> dense_groups("dense_dci", 27)
    (range(0, 13), range(13, 26))
    """
    if kind == "dense_sci":
        return tuple(range(number, number + 1) for number in (round(7 * layers / 27), round(15 * layers / 27)))
    return range((layers - 1) // 2), range((layers - 1) // 2, layers - 1)


class Latents(nn.Module):
    """Learned queries [M, D], the same for every image."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, features: Tensor) -> Tensor:
        return self.weight.expand(len(features), -1, -1)  # (B, M, D)


class PerceiverAttention(nn.Module):
    """Latents ask the features and each other: queries of the latents, keys and values of [features, latents]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.key_value_heads = heads, heads // 4 if heads % 4 == 0 else heads
        narrow = width // heads * self.key_value_heads
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, narrow, bias=False)
        self.v_proj = Linear(width, narrow, bias=False)
        self.o_proj = Linear(width, width, bias=False)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        context = torch.cat([features, latents], dim=1)  # (B, N + M, D)
        q = self.q_proj(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, M, d)
        k, v = (
            projection(context)
            .unflatten(-1, (self.key_value_heads, -1))
            .transpose(1, 2)
            .repeat_interleave(self.heads // self.key_value_heads, dim=1)  # (B, h, N + M, d)
            for projection in (self.k_proj, self.v_proj)
        )
        attended: Tensor = self.o_proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, M, D)
        return attended


class PerceiverMLP(nn.Module):
    """down(silu(gate x) * up x), hidden width 4 D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, 4 * width, bias=False)
        self.up_proj = Linear(width, 4 * width, bias=False)
        self.down_proj = Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class PerceiverLayer(nn.Module):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.input_latents_norm = nn.RMSNorm(width, eps)
        self.input_context_norm = nn.RMSNorm(width, eps)
        self.self_attn = PerceiverAttention(width, heads)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = PerceiverMLP(width)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        latents = latents + self.self_attn(self.input_latents_norm(latents), self.input_context_norm(features))
        return latents + self.mlp(self.post_attention_layernorm(latents))


class ResamplerConnector(Connector):
    """W resampled + b, where M latents take from the features what they ask for; M does not depend on N.

    Differs from Idefics2 in where the width changes: it projects first and resamples in the decoder's width, this
    resamples in the vision tower's (61 instead of 174 million parameters at PaliGemma's dimensions, of which each takes
    16 bytes in training), and the pretrained projector comes last.
    """

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        vision, connector = config.vision, config.connector
        width, eps = vision.hidden_size, vision.layer_norm_eps
        self.latents = Latents(connector.latents, width)
        self.layers = nn.ModuleList(
            PerceiverLayer(width, vision.num_attention_heads, eps) for _ in range(connector.depth)
        )
        self.norm = nn.RMSNorm(width, eps)
        self.linear = Linear(width, config.text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        latents = self.latents(features)  # (B, M, D)
        for layer in self.layers:
            latents = layer(latents, features)
        tokens: Tensor = self.linear(self.norm(latents))
        return tokens

    def start_from(self, projector: Linear) -> None:
        copy(projector, self.linear)


class PixelShuffleConnector(Connector):
    """W [f_1; ...; f_k] + b over the k = factor^2 patches of a square, row by row; M = N / k."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.factor = config.connector.factor
        self.linear = Linear(self.factor**2 * config.vision.hidden_size, config.text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.linear(pixel_shuffle(features, self.factor))
        return tokens

    def start_from(self, projector: Linear) -> None:
        patches = self.factor**2
        self.linear.weight.copy_(projector.weight.repeat(1, patches) / patches)
        self.linear.bias.copy_(projector.bias)


def pixel_shuffle(features: Tensor, factor: int) -> Tensor:
    """[B, N, D] of a square of patches -> [B, N / factor^2, factor^2 D], the patches of a square row by row."""
    side = round(features.shape[1] ** 0.5)
    squares = features.unflatten(1, (side // factor, factor, side // factor, factor))  # (B, rows, i, columns, j, D)
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


KINDS: dict[str, type[Connector]] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "dense_sci": DenseConnector,
    "dense_dci": DenseConnector,
    "resampler": ResamplerConnector,
    "pixel_shuffle": PixelShuffleConnector,
}


def make_connector(config: PaliGemmaConfig) -> Connector:
    """The connector that `config` names, without values of its own."""
    connector: Connector = KINDS[config.connector.kind](config)
    return connector


@torch.no_grad()
def start(connector: Connector, config: PaliGemmaConfig, projector: Linear | None) -> None:
    """Fill a connector: drawn from the seed, and from the published projector where that is to be its start; None where
    there is none.

    Drawn on the CPU, by what is the same on every processor: weights uniform in +-1/sqrt(inputs), latents in
    +-sqrt(3 / D), norms identity, biases zero.
    """
    generator = torch.Generator().manual_seed(config.connector.seed)
    for module in connector.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(weight, nn.Parameter):
            bound = ((3 if isinstance(module, Latents) else 1) / weight.shape[1]) ** 0.5
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(bias)
    if config.connector.start == "pretrained":
        assert projector is not None, "only the published connector is replaced by one that starts from it"
        connector.start_from(projector)


def copy(projector: Linear, linear: Linear) -> None:
    """Give `linear` the projector's values."""
    linear.weight.copy_(projector.weight)
    linear.bias.copy_(projector.bias)
