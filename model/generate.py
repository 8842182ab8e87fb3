"""Decoding: one batched prefill, then a token at a time for all rows, over a cache reserved once.

Prompts of different lengths are padded on the right. New tokens share the cache slots behind the longest prompt; each
row keeps its own positions, and its padding stays masked, so a batch answers as its rows would alone. Of several
samples of a prompt the prefill is computed once.

Axes: B prompts, S prompt length, K samples of a prompt, R = B * K rows, T new tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
        samples: K, how often each prompt is continued.
        seeds: one for each row, in place of `seed`: what a row draws then depends on its own one alone, and not on the
            batch that it is in.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    samples: int = 1
    seeds: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_p={self.top_p}: expected "
                "max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1"
            )
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: expected at least 1, how often each prompt is continued")

    def numbers(self, rows: int, device: torch.device) -> Tensor | None:
        """What the tokens of each row are sampled with, [R, max_new_tokens] in [0, 1), f64, or where the device has
        none f32; None where they are not sampled. Drawn on the CPU, so that they are the same on every device.

        Raises:
            ValueError: there are seeds, and not one for each row.
        """
        if self.seeds and len(self.seeds) != rows:
            raise ValueError(f"got {len(self.seeds)} seeds for {rows} rows; expected one for each, or none")
        if not self.temperature:
            return None

        def drawn(seed: int, *shape: int) -> Tensor:
            return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        of_rows = [drawn(seed, self.max_new_tokens) for seed in self.seeds]
        found = torch.stack(of_rows) if of_rows else drawn(self.seed, rows, self.max_new_tokens)
        return (found.float() if device.type == "mps" else found).to(device)


class Generation(NamedTuple):
    """New tokens i64 [R, T], those of one prompt's samples side by side, and of each its log-probability f32 [R, T]
    (natural logarithm, at temperature 1, whatever it was sampled with); 0 where a row has finished.
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
    rows = batch * sampling.samples
    lengths = attention_mask.sum(dim=1)  # (B,)
    numbers = sampling.numbers(rows, x.device)  # (R, max_new_tokens)
    cache = KVCache(decoder.model.config, batch, prompt_length + sampling.max_new_tokens - 1, x.dtype, x.device)

    positions = torch.arange(1, prompt_length + 1, device=x.device).expand(batch, -1)  # (B, S)
    last = (lengths - 1)[:, None]  # (B, 1): the last real token of each prompt
    mask = prefix_lm_mask(attention_mask, token_type_ids)
    hidden = decoder.model(x, mask, positions, cache, query_positions=last)[:, 0]  # (B, D)

    visible = attention_mask.bool()  # (B, slots so far)
    if sampling.samples > 1:
        cache.repeat(sampling.samples)
        lengths, hidden, visible = (of.repeat_interleave(sampling.samples, dim=0) for of in (lengths, hidden, visible))
    finished = torch.zeros(rows, dtype=torch.bool, device=x.device)
    new_tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    while True:
        logits = decoder.head(hidden).float()  # (R, V)
        number = None if numbers is None else numbers[:, len(new_tokens)]
        token = pick_token(logits, sampling.temperature, sampling.top_p, number)  # (R,)
        chosen = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=1)  # (R,)
        log_probs.append(chosen.masked_fill(finished, 0.0))
        token = token.masked_fill(finished, pad_token_id)
        new_tokens.append(token)
        finished |= token == eos_token_id
        if len(new_tokens) == sampling.max_new_tokens or is_done(bool(finished.all())):
            return Generation(torch.stack(new_tokens, dim=1), torch.stack(log_probs, dim=1))
        visible = torch.cat((visible, torch.ones_like(visible[:, :1])), dim=1)
        positions = (lengths + len(new_tokens))[:, None]  # (R, 1)
        x = decoder.model.embed(token[:, None])  # (R, 1, D)
        hidden = decoder.model(x, visible[:, None, None, :], positions, cache)[:, 0]  # (R, D)


def pick_token(logits: Tensor, temperature: float, top_p: float, number: Tensor | None) -> Tensor:
    """Logits f32 [R, V] -> next tokens i64 [R]: the most likely, or sampled (nucleus sampling, arXiv 1904.09751).

    number: of each row one in [0, 1), [R], as `Sampling.numbers` has them: the token is the one in whose part of the
        cumulated probabilities it lies, so that a row's token depends on its own logits and number alone.
    """
    if number is None:
        return logits.argmax(dim=-1)
    probabilities, tokens = torch.softmax(logits / temperature, dim=-1).to(number.dtype), None
    if top_p < 1:
        probabilities, tokens = probabilities.sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities  # of the more likely tokens: the first one always stays
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulated = probabilities.cumsum(dim=-1)  # (R, V)
    total = cumulated[:, -1:]
    below = torch.minimum(number[:, None] * total, total.nextafter(torch.zeros_like(total)))  # also where it rounds up
    choice = torch.searchsorted(cumulated, below, right=True)  # (R, 1): the first one that exceeds it
    return (choice if tokens is None else tokens.gather(1, choice))[:, 0]
