"""Decoding: one batched prefill, then a token at a time for all rows, over a cache reserved once.

Prompts of different lengths are padded on the right. New tokens share the cache slots behind the longest prompt; each
row keeps its own positions, and its padding stays masked, so a batch answers as its rows would alone.

Axes: B batch, S prompt length, T new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import require_suffixes
from model.gemma import GemmaForCausalLM
from model.layers import KVCache, prefix_lm_mask


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many.

    Attributes:
        max_new_tokens: at most this many, `eos` included; decoding stops earlier when every row has finished.
        temperature: 0 is greedy; otherwise tokens are sampled from softmax(logits / temperature).
        top_p: sample from the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        seed: of the sampling; the same seed and batch give the same tokens.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_p={self.top_p}: expected "
                "max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1"
            )


class Generation(NamedTuple):
    """New tokens i64 [B, T], and of each its log-probability f32 [B, T] (natural logarithm, at temperature 1, whatever
    it was sampled with); 0 where a row has finished.
    """

    tokens: Tensor
    log_probs: Tensor

    def rows(self, eos_token_id: int) -> list[tuple[list[int], list[float]]]:
        """Of each row its tokens, the last one `eos` unless the row was cut off, and their log-probabilities."""
        found = []
        for ids, log_probs in zip(self.tokens.tolist(), self.log_probs.tolist(), strict=True):
            length = ids.index(eos_token_id) + 1 if eos_token_id in ids else len(ids)
            found.append((ids[:length], log_probs[:length]))
        return found


def require_right_padding(attention_mask: Tensor) -> None:
    """ValueError where a row of the mask [B, S] is not ones followed by zeros, with at least one 1."""
    lengths = attention_mask.sum(dim=1, keepdim=True)  # (B, 1)
    slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    if not torch.equal(attention_mask.bool(), slots < lengths) or not bool(lengths.all()):
        raise ValueError(
            "attention_mask must be ones followed by zeros, at least one 1 a row: pad prompts on the right"
        )


def require_one_suffix(token_type_ids: Tensor, attention_mask: Tensor) -> None:
    """ValueError where the types [B, S] of a row are not 0, then perhaps 1: new tokens continue one suffix."""
    require_suffixes(token_type_ids, attention_mask)
    if int(highest := token_type_ids.max()) > 1:
        raise ValueError(
            f"token_type_ids go up to {highest}, for a row with {highest} suffixes; expected 0 and 1, for new tokens "
            "continue one suffix: give each a row of its own"
        )


@torch.inference_mode()
def generate(
    decoder: GemmaForCausalLM,
    x: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    sampling: Sampling,
    eos_token_id: int,
    pad_token_id: int,
    is_done: Callable[[bool], bool] = bool,
) -> Generation:
    """Continue prompts, given as embeddings [B, S, D], right-padded; masks [B, S] as in `PaliGemma.forward`.

    is_done: of whether every row has finished, whether decoding stops.

    Returns:
        The new tokens only: each row ends in `eos` (unless cut off) and is filled up with `pad`.
    """
    batch, prompt_length, _ = x.shape
    lengths = attention_mask.sum(dim=1)  # (B,)
    generator = torch.Generator(x.device).manual_seed(sampling.seed) if sampling.temperature else None
    cache = KVCache(decoder.model.config, batch, prompt_length + sampling.max_new_tokens - 1, x.dtype, x.device)

    positions = torch.arange(1, prompt_length + 1, device=x.device).expand(batch, -1)  # (B, S)
    last = (lengths - 1)[:, None]  # (B, 1): the last real token of each prompt
    mask = prefix_lm_mask(attention_mask, token_type_ids)
    hidden = decoder.model(x, mask, positions, cache, query_positions=last)[:, 0]  # (B, D)

    visible = attention_mask.bool()  # (B, slots so far)
    finished = torch.zeros(batch, dtype=torch.bool, device=x.device)
    new_tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    while True:
        logits = decoder.head(hidden).float()  # (B, V)
        token = pick_token(logits, sampling.temperature, sampling.top_p, generator)  # (B,)
        chosen = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=1)  # (B,)
        log_probs.append(chosen.masked_fill(finished, 0.0))
        token = token.masked_fill(finished, pad_token_id)
        new_tokens.append(token)
        finished |= token == eos_token_id
        if len(new_tokens) == sampling.max_new_tokens or is_done(bool(finished.all())):
            return Generation(torch.stack(new_tokens, dim=1), torch.stack(log_probs, dim=1))
        visible = torch.cat((visible, torch.ones_like(visible[:, :1])), dim=1)
        positions = (lengths + len(new_tokens))[:, None]  # (B, 1)
        x = decoder.model.embed(token[:, None])  # (B, 1, D)
        hidden = decoder.model(x, visible[:, None, None, :], positions, cache)[:, 0]  # (B, D)


def pick_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Logits f32 [B, V] -> next tokens i64 [B]: the most likely, or sampled (nucleus sampling, arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # mass of the more likely tokens: the first token always stays
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(ordered, 1, generator=generator)
    return tokens.gather(1, choice)[:, 0]
