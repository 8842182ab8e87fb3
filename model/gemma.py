"""Gemma decoder (arXiv 2403.08295): pre-norm blocks of grouped-query attention with rotary positions and a GeGLU MLP.

The output head is the embedding itself (tied); it has no second name and no second tensor.

Axes: B batch, S sequence, U query positions, T keys, D hidden, F intermediate, h heads, g key/value heads, d head
width, V vocabulary. U is S everywhere but in the last layer, which computes only the outputs that are used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import TextConfig
from model.layers import KVCache, RMSNorm, apply_rotary, gather_positions, rotary_embedding
from model.ops.attention import attention_bias, grouped_attention
from model.ops.geglu import geglu
from model.ops.linear import Linear, linear
from model.ops.recompute import recompute_cheap_outputs, recompute_layer

Rotary = tuple[Tensor, Tensor]  # cos and sin of the rotary angles, each (B, S, d)


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
        x: Tensor,
        rotary: Rotary,
        bias: Tensor,
        cache: KVCache | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """As in `GemmaLayer`."""
        q = self.split_heads(self.q_proj(gather_positions(x, query_positions)))  # (B, h, U, d)
        k = self.split_heads(self.k_proj(x))  # (B, g, S, d)
        v = self.split_heads(self.v_proj(x))  # (B, g, S, d)
        q = apply_rotary(q, *(gather_positions(t, query_positions) for t in rotary))
        k = apply_rotary(k, *rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, g, T, d)
        output: Tensor = self.o_proj(grouped_attention(q, k, v, bias))  # (B, U, h * d) -> (B, U, D)
        return output

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * d] -> [B, heads, S, d]"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GemmaMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), [B, U, D] -> [B, U, D]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))  # (B, U, F) -> (B, U, D)
        return output


class GemmaLayer(nn.Module):
    """A decoder block: attention, then an MLP, each behind a norm and added to its input."""

    def __init__(self, config: TextConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        bias: Tensor,
        cache: KVCache | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D], or the outputs of `query_positions` alone, [B, U, D].

        rotary: cos and sin, each [B, S, d]. bias: of the scores, by query and key, see `attention_bias`; the keys are
        those in the cache and of x. query_positions: i64 [B, U]; they attend to all of x, so their outputs are exact.
        """
        x = gather_positions(x, query_positions) + self.self_attn(
            self.input_layernorm(x), rotary, bias, cache, query_positions
        )  # (B, U, D)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class GemmaModel(nn.Module):
    """Embedding, layers, final norm.

    Attributes:
        fold_heads: the form of attention, see `grouped_attention`; None takes the better one for the device.
        recompute_layers: the first so many layers are recomputed in the backward pass.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.fold_heads: bool | None = None
        self.recompute_layers = 0
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def set_recompute(self, layers: int = 0) -> None:
        """Trade time for memory in training: recompute the first `layers` layers in the backward pass instead of saving
        their activations. Values and gradients stay the same.
        """
        self.recompute_layers = layers

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
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, S, D] -> final hidden states [B, S, D], or those of `query_positions` i64 [B, U], [B, U, D]:
        the last layer then computes those alone.

        mask: bool [B, 1, S, T], True where a query may look at a key. position_ids: i64 [B, S].
        """
        rotary = rotary_embedding(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        bias = last_bias = self.bias(mask, x.dtype)
        if query_positions is not None:
            last_bias = self.bias(gather_positions(mask[:, 0], query_positions)[:, None], x.dtype)
        last = len(self.layers) - 1
        with recompute_cheap_outputs():
            for i, layer in enumerate(self.layers):
                inputs = (x, rotary, bias, cache) if i < last else (x, rotary, last_bias, cache, query_positions)
                x = recompute_layer(layer, *inputs) if i < self.recompute_layers else layer(*inputs)
        if cache is not None:
            cache.length += mask.shape[2]
        normed: Tensor = self.norm(x)
        return normed

    def bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """The attention bias of a mask bool [B, 1, S, T], with as many rows a query as heads are folded."""
        folded = mask.device.type == "cpu" if self.fold_heads is None else self.fold_heads
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        return attention_bias(mask, dtype, group if folded else 1)


class GemmaForCausalLM(nn.Module):
    """The decoder with its tied output head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.model = GemmaModel(config)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V], in the weights' dtype."""
        return linear(hidden, self.model.embed_tokens.weight)
