"""Gemma decoder (arXiv 2403.08295): RMSNorm, rotary positions, grouped-query attention, gated MLP.

Numerics follow the published reference, so that fp32 and bf16 agree with it: RMSNorm is computed in fp32 with `1 +
weight` and cast once; rotary angles, cos and sin are fp32 and the rotation runs in the activations' dtype. The output
head is the embedding itself (tied); it has no second name and no second tensor.

Axes: B batch, S sequence (queries), T keys, D hidden, h heads, g key/value heads, d head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import TextConfig


class KVCache:
    """Keys and values of all layers, storage reserved once for `max_length` slots.

    Slots are shared by the rows: every call appends the same number of slots to each row. Which slots a row may look at
    (its padding aside) is the attention mask's business.
    """

    def __init__(
        self, config: TextConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0  # slots filled by finished forward passes

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, g, S, d] of one layer; returns all that layer holds, [B, g, T, d]."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@dataclasses.dataclass(frozen=True)
class Rotation:
    """cos and sin of the rotary angles, [B, 1, S, d], in the activations' dtype (arXiv 2104.09864)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, position_ids: Tensor, config: TextConfig, dtype: torch.dtype) -> Rotation:
        # Made anew for each pass: a buffer would be cast along with the model and lose the frequencies' precision.
        powers = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
        frequencies = 1.0 / (config.rope_theta**powers)
        angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, S, d/2)
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def apply(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)  # half-split, not interleaved
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.sin


def prefix_lm_mask(attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
    """Who may look at whom: (causal or both in the prefix) and the key is no padding.

    For the row `image prefix | answer eos | pad`, with types 0 0 1 1 0:

                 image prefix answer eos pad
        image      x     x      .     .   .
        prefix     x     x      .     .   .
        answer     x     x      x     .   .
        eos        x     x      x     x   .
        pad        x     x      x     x   .     (never read)

    Args:
        attention_mask: [B, S], nonzero at real tokens.
        token_type_ids: [B, S], 0 in image and prefix, 1 in the suffix.

    Returns:
        bool [B, 1, S, S]: queries by keys.
    """
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    prefix = token_type_ids == 0
    allowed = causal | (prefix[:, :, None] & prefix[:, None, :])
    return (allowed & attention_mask.bool()[:, None, :])[:, None]


class GemmaRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class GemmaAttention(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor, rotation: Rotation, cache: KVCache | None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, h or g, S, d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotation.apply(q), rotation.apply(k)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))  # (B, h, T, d)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))  # (B, S, D)
        return output


class GemmaMLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)

    def forward(self, x: Tensor, mask: Tensor, rotation: Rotation, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, rotation, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class GemmaModel(nn.Module):
    """Embedding, layers, final norm.

    `recompute` trades time for memory in training: a layer's activations are computed again in the backward pass
    instead of being kept. Non-reentrant, so that adapters behind frozen inputs get their gradients.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = False

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, S] -> embeddings [B, S, D], scaled by sqrt(D) rounded to the weights' dtype as in the
        reference.
        """
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.embed_tokens.weight.dtype)
        embedded: Tensor = self.embed_tokens(input_ids) * scale.to(input_ids.device)
        return embedded

    def forward(self, x: Tensor, mask: Tensor, position_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings [B, S, D] -> final hidden states [B, S, D].

        mask: bool [B, 1, S, T], True where a query may look at a key. position_ids: i64 [B, S].
        """
        rotation = Rotation.at(position_ids, self.config, x.dtype)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, mask, rotation, cache, use_reentrant=False)
            else:
                x = layer(x, mask, rotation, cache)
        if cache is not None:
            cache.length += x.shape[1]
        normed: Tensor = self.norm(x)
        return normed


class GemmaForCausalLM(nn.Module):
    """The decoder with its tied output head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = GemmaModel(config)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V], in the weights' dtype."""
        return F.linear(hidden, self.model.embed_tokens.weight)
