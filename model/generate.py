"""Decoding: one batched prefill, then a token at a time for all rows, over a cache reserved once.

Prompts of different lengths are padded on the right. New tokens share the cache slots behind the longest prompt; each
row keeps its own positions, and its padding stays masked, so a batch answers as its rows would alone.

Axes: B batch, S prompt length, T new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.gemma import KVCache, prefix_lm_mask

if TYPE_CHECKING:
    from model.paligemma import PaliGemma


@torch.inference_mode()
def generate(
    model: PaliGemma,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    image_features: Tensor | None = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Continue right-padded prompts; arguments as in `PaliGemma.forward`.

    Args:
        max_new_tokens: at most this many, `eos` included; decoding stops earlier when every row has finished.
        temperature: 0 is greedy; otherwise tokens are sampled from softmax(logits / temperature).
        top_p: sample from the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        seed: of the sampling; the same seed and batch give the same tokens.

    Returns:
        i64 [B, T], the new tokens only: each row ends in `eos` (unless cut off) and is filled up with `pad`.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: expected max_new_tokens >= 1, "
            "temperature >= 0 and 0 < top_p <= 1"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    lengths = attention_mask.sum(dim=1)  # (B,)
    slots = torch.arange(input_ids.shape[1], device=input_ids.device)
    if not torch.equal(attention_mask.bool(), slots < lengths[:, None]) or not bool(lengths.all()):
        raise ValueError(
            "attention_mask must be ones followed by zeros, at least one 1 a row: pad prompts on the right"
        )
    if pixel_values is not None:
        image_features = model.encode_images(pixel_values)

    decoder, config = model.language_model, model.config
    batch, prompt_length = input_ids.shape
    generator = torch.Generator(input_ids.device).manual_seed(seed) if temperature else None
    cache = KVCache(config.text, batch, prompt_length + max_new_tokens - 1, model.dtype, input_ids.device)

    x = model.embed(input_ids, image_features)
    positions = (slots + 1).expand(batch, -1)
    last = (lengths - 1)[:, None]  # the last real token of each prompt
    hidden = decoder.model(x, prefix_lm_mask(attention_mask, token_type_ids), positions, cache, used=last)[:, 0]

    visible = attention_mask.bool()  # (B, slots so far)
    finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    new_tokens: list[Tensor] = []
    while True:
        token = pick_token(decoder.head(hidden), temperature, top_p, generator)
        token = token.masked_fill(finished, config.pad_token_id)
        new_tokens.append(token)
        finished |= token == config.eos_token_id
        if len(new_tokens) == max_new_tokens or bool(finished.all()):
            return torch.stack(new_tokens, dim=1)
        visible = torch.cat((visible, torch.ones_like(visible[:, :1])), dim=1)
        positions = (lengths + len(new_tokens))[:, None]
        x = decoder.model.embed(token[:, None])
        hidden = decoder.model(x, visible[:, None, None, :], positions, cache)[:, 0]


def pick_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Logits [B, V] -> next tokens i64 [B]: the most likely, or sampled (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.float().argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the more likely tokens: the first token always stays
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(ordered, 1, generator=generator)
    return tokens.gather(1, choice)[:, 0]
