"""Gemma decoder (arXiv 2403.08295): RMSNorm, rotary positions, grouped-query attention, gated MLP.

Numerics follow the published reference, so that fp32 and bf16 agree with it: RMSNorm is computed in fp32 with `1 +
weight` and cast once; rotary angles, cos and sin are fp32 and the rotation runs in the activations' dtype. The output
head is the embedding itself (tied); it has no second name and no second tensor.

Axes: B batch, S sequence, U the positions that are used after the last layer, T keys, D hidden, h heads, g key/value
heads, d head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import TextConfig
from model.lean import gated, remade, rms_norm
from model.products import Linear, attention, linear

ALIGNED = 8  # elements


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
class Sight:
    """Where tokens stand and what they see; made once for all layers.

    Attributes:
        cos, sin: of the rotary angles (arXiv 2104.09864), [B, 1, S, d] in the activations' dtype.
        bias: 0 at keys that a query may look at, -inf elsewhere; [B, 1, S * h/g, T] where heads are folded, and
            [B, 1, S, T] for all heads where they are not. In memory its rows have a multiple of ALIGNED elements: of
            any other bias CUDA's kernels make, and keep, a copy in every layer.
        folded: the form that attention takes, see `grouped_attention`.
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor
    folded: bool

    @classmethod
    def of(
        cls, mask: Tensor, position_ids: Tensor, config: TextConfig, dtype: torch.dtype, folded: bool | None = None
    ) -> Sight:
        """From a bool mask [B, 1, S, T] and positions i64 [B, S]; folded on a CPU alone, unless told otherwise."""
        folded = mask.device.type == "cpu" if folded is None else folded
        # Made anew for each pass: a buffer would be cast along with the model and lose the frequencies' precision.
        powers = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
        frequencies = 1.0 / config.rope_theta**powers
        angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, S, d/2)
        angles = torch.cat((angles, angles), dim=-1)
        *shape, keys = mask.shape
        group = config.num_attention_heads // config.num_key_value_heads if folded else 1
        shape += [group, -(-keys // ALIGNED) * ALIGNED]
        bias = torch.zeros(shape, dtype=dtype, device=mask.device)[..., :keys]
        bias.masked_fill_(~mask[..., None, :], float("-inf"))
        return cls(angles.cos().to(dtype), angles.sin().to(dtype), bias.flatten(2, 3), folded)

    def rotate(self, x: Tensor) -> Tensor:
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
        return rms_norm(x, self.weight, self.eps)


class GemmaAttention(nn.Module):
    """Grouped-query attention: g key/value heads for h query heads."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        queries: Tensor,
        seeing: Sight,
        x: Tensor,
        sight: Sight,
        cache: KVCache | None,
        unkept: AbstractContextManager[None],
    ) -> Tensor:
        """Tokens `queries` [B, U, D] look at the tokens x [B, S, D], and at those in the cache; x is read `unkept`."""
        with unkept:
            q, k, v = (
                projection(t).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, h or g, U or S, d)
                for projection, t in ((self.q_proj, queries), (self.k_proj, x), (self.v_proj, x))
            )
        q, k = seeing.rotate(q), sight.rotate(k)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        output: Tensor = self.o_proj(grouped_attention(q, k, v, seeing))  # (B, U, D)
        return output


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """q [B, h, U, d], k and v [B, g, T, d] -> what each head attends to, side by side, [B, U, h * d].

    Folded, the heads of a group are more query rows of its one key/value head: the least memory, and on CPUs the least
    time (benchmarks/LOG.md). Unfolded, each head sees its group's keys through a view (for g = 1; otherwise a copy).
    On a card that gives the kernels, which share out their work by head and row of the batch, h times as many blocks,
    and the bias has no copy for each head. Known of torch's CUDA kernels, from its sdp_utils.cpp and attention.cpp:
    flash attention takes no bias; memory-efficient attention takes keys expanded over heads without a copy, does not
    group heads by itself, and reads a bias whose rows are aligned as it is, expanded over heads. Assumed: that it is
    faster so, and that the kernel of plain products (math) is never chosen.
    """
    if sight.folded:
        q = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # (B, g, U, h/g, d)
        attended = attention(q.flatten(2, 3), k, v, sight.bias)
        return attended.unflatten(2, q.shape[2:4]).transpose(1, 2).flatten(2)
    group = q.shape[1] // k.shape[1]
    k, v = (t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for t in (k, v))  # (B, h, T, d)
    return attention(q, k, v, sight.bias).transpose(1, 2).flatten(2)


class GemmaMLP(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, unkept: AbstractContextManager[None], checkpointed: bool) -> Tensor:
        """The backward pass keeps gate and up, and makes their product again; x is read `unkept`."""
        with unkept:
            gate, up = self.gate_proj(x), self.up_proj(x)
        product = gated(gate, up)
        with remade(product, partial(gated, gate.detach(), up.detach()), checkpointed):
            return self.down_proj(product)


class GemmaLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)
        self.recompute: Literal["nothing", "gate_up", "layer"] = "nothing"

    def forward(self, *inputs: Any) -> Tensor:
        """`transform`, recomputed in the backward pass if so asked."""
        if self.recompute == "layer" and torch.is_grad_enabled():
            return checkpoint(self.transform, *inputs, use_reentrant=False)
        return self.transform(*inputs)

    def transform(
        self, x: Tensor, sight: Sight, cache: KVCache | None, used: Tensor | None = None, seeing: Sight | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D], or where only the positions `used` i64 [B, U] are wanted, `seeing` so, [B, U, D]."""
        checkpointed = self.recompute == "layer"
        normed, unkept = unkept_output(self.input_layernorm, x, checkpointed)
        x = pick(x, used) + self.self_attn(pick(normed, used), seeing or sight, normed, sight, cache, unkept)
        if self.recompute == "gate_up" and torch.is_grad_enabled():
            return x + checkpoint(self.feed, x, True, use_reentrant=False)
        return x + self.feed(x, checkpointed)

    def feed(self, x: Tensor, checkpointed: bool) -> Tensor:
        """The MLP behind its norm, [B, U, D] -> [B, U, D]."""
        normed, unkept = unkept_output(self.post_attention_layernorm, x, checkpointed)
        return self.mlp(normed, unkept, checkpointed)


def unkept_output(norm: nn.Module, x: Tensor, checkpointed: bool) -> tuple[Tensor, AbstractContextManager[None]]:
    """norm(x), and the context within which it is read without being kept for the backward pass, as x is anyway."""
    normed: Tensor = norm(x)
    return normed, remade(normed, partial(norm, x.detach()), checkpointed)


def pick(x: Tensor, positions: Tensor | None) -> Tensor:
    """[B, S, D] at positions i64 [B, U] -> [B, U, D]; all of it for None."""
    return x if positions is None else x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class GemmaModel(nn.Module):
    """Embedding, layers, final norm.

    fold_heads: the form of attention, see `grouped_attention`; None takes what the device is better at.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.fold_heads: bool | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def set_recompute(self, layers: int = 0, gate_up: bool = False) -> None:
        """Trade time for memory in training: the first `layers` layers are computed again in the backward pass instead
        of keeping activations, of the others the products of gate and up. Values and gradients stay the same.
        """
        for i, layer in enumerate(self.layers):
            layer.recompute = "layer" if i < layers else "gate_up" if gate_up else "nothing"  # type: ignore[assignment]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, S] -> embeddings [B, S, D], scaled by sqrt(D) rounded to the weights' dtype as in the
        reference.
        """
        # Rounded on the CPU, for a number costs no copy to the device.
        scale = torch.tensor(self.config.hidden_size**0.5, dtype=self.embed_tokens.weight.dtype, device="cpu").item()
        embedded: Tensor = self.embed_tokens(input_ids) * scale
        return embedded

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        position_ids: Tensor,
        cache: KVCache | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, S, D] -> final hidden states [B, S, D], or [B, U, D] at the positions `used` i64 [B, U]: the
        last layer then works for those alone.

        mask: bool [B, 1, S, T], True where a query may look at a key. position_ids: i64 [B, S].
        """
        sight_of = partial(Sight.of, config=self.config, dtype=x.dtype, folded=self.fold_heads)
        sight, seeing = sight_of(mask, position_ids), None
        if used is not None:
            seeing = sight_of(pick(mask[:, 0], used)[:, None], position_ids.gather(1, used))
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, sight, cache)
        x = last(x, sight, cache, used, seeing)
        if cache is not None:
            cache.length += mask.shape[2]
        normed: Tensor = self.norm(x)
        return normed


class GemmaForCausalLM(nn.Module):
    """The decoder with its tied output head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = GemmaModel(config)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V], in the weights' dtype."""
        return linear(hidden, self.model.embed_tokens.weight)
