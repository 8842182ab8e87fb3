"""What a decoder is made of besides linear layers: RMSNorm, rotary embedding, prefix-LM mask, KV cache.

Numerics follow the published reference, so that fp32 and bf16 agree with it: RMSNorm is computed in fp32 with `1 +
weight` and cast once; rotary angles, cos and sin are fp32 and the rotation runs in the activations' dtype.

Axes: B batch, S sequence, T keys, D hidden, h heads, g key/value heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import TextConfig
from model.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last axis (arXiv 1910.07467; the 1 + is Gemma's)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotary_embedding(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles (arXiv 2104.09864) of positions i64 [B, S]; each [B, S, d].

    Computed for each pass: a buffer would be cast along with the model and lose the frequencies' precision.
    """
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim  # (d/2,)
    angles = position_ids[..., None].float() * (1.0 / theta**powers)  # (B, S, d/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, S, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, heads, S, d] by the angles of their positions; cos and sin are [B, S, d]."""
    left, right = x.chunk(2, dim=-1)  # half-split, not interleaved
    return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]


def prefix_lm_mask(attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
    """Who may look at whom: (the key is in the prefix, or in the query's suffix and not after it) and is no padding.

    A row may hold several suffixes of its prefix, none of which sees another: each is as in a row of its own. For the
    row `image prefix | yes eos | no eos | pad`, with types 0 0 1 1 2 2 0:

                 image prefix  yes eos  no eos  pad
        image      x     x      .   .    .  .    .
        prefix     x     x      .   .    .  .    .
        yes        x     x      x   .    .  .    .
        eos        x     x      x   x    .  .    .
        no         x     x      .   .    x  .    .
        eos        x     x      .   .    x  x    .
        pad        x     x      .   .    .  .    .     (never read)

    Args:
        attention_mask: [B, S], nonzero at real tokens.
        token_type_ids: [B, S], 0 in image and prefix, 1 in the first suffix, 2 in the second and so on.

    Returns:
        bool [B, 1, S, S]: queries by keys.
    """
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()  # (S, S)
    queries, keys = token_type_ids[:, :, None], token_type_ids[:, None, :]
    allowed = (keys == 0) | (causal & (queries == keys))  # (B, S, S)
    return (allowed & attention_mask.bool()[:, None, :])[:, None]  # (B, 1, S, S)


def gather_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """x [B, S, D] at positions i64 [B, U] -> [B, U, D]; all of x for None."""
    return x if positions is None else x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


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

    def repeat(self, times: int) -> None:
        """Hold each row so many times, side by side."""
        self.keys, self.values = (held.repeat_interleave(times, dim=1) for held in (self.keys, self.values))
