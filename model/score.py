"""How likely the network takes each of several answers to be: candidates behind a prompt, many of them in one row.

The prefix never sees a suffix, so that candidates which do not see each other are scored in one row as they would be in
rows of their own, and image and prompt are computed once for all of them. Not here: finding an answer (generate.py).

Axes: B prompts, S prompt length, K candidates of a prompt, N image tokens, D hidden, L supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.batch import IGNORE_INDEX, TokenBatch
from model.generate import require_right_padding

Candidates = Sequence[Sequence[int]]  # of one prompt: the tokens of each


class Scores(NamedTuple):
    """Of each prompt its candidates: the sum of their tokens' log-probabilities, f32 [K] (natural logarithm), and how
    many tokens they have, i64 [K].
    """

    log_probs: list[Tensor]
    tokens: list[Tensor]


def require_candidates(candidates: Sequence[Candidates], prompts: int, at_once: int) -> None:
    """ValueError where there are not candidates for each prompt, one of them has no token, or none fits in a row."""
    if at_once < 1:
        raise ValueError(f"at_once is {at_once}; expected at least 1 candidate in a row")
    if len(candidates) != prompts:
        raise ValueError(f"got candidates for {len(candidates)} prompts, and {prompts} prompts; expected as many")
    for row, of_row in enumerate(candidates):
        if not of_row:
            raise ValueError(f"prompt {row} has no candidates; expected at least one")
        if empty := [number for number, tokens in enumerate(of_row) if not tokens]:
            raise ValueError(f"candidate {empty[0]} of prompt {row} has no tokens; expected at least one: <eos>")


def rows_of(prompts: Sequence[Tensor], chunk: Sequence[Candidates], image_token_id: int, pad_id: int) -> TokenBatch:
    """A row of each prompt i64 [S] and its candidates, on the CPU; their tokens are the labels."""
    rows, types, labels = [], [], []
    for prompt, candidates in zip(prompts, chunk, strict=True):
        answers = torch.tensor([token for tokens in candidates for token in tokens])
        rows.append(torch.cat((prompt, answers)))
        numbers = [number for number, tokens in enumerate(candidates, start=1) for _ in tokens]
        types.append(torch.tensor([0] * len(prompt) + numbers))
        labels.append(torch.cat((torch.full_like(prompt, IGNORE_INDEX), answers)))
    return TokenBatch.of(
        image_token_id,
        input_ids=pad_sequence(rows, True, pad_id),
        attention_mask=pad_sequence([torch.ones_like(row) for row in rows], True, 0),
        token_type_ids=pad_sequence(types, True, 0),
        labels=pad_sequence(labels, True, IGNORE_INDEX),
    )


@torch.inference_mode()
def score(
    logits_of: Callable[[TokenBatch, Tensor | None], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    candidates: Sequence[Candidates],
    image_features: Tensor | None,
    at_once: int,
    image_token_id: int,
    pad_id: int,
) -> Scores:
    """As `PaliGemma.score`.

    logits_of: a batch with labels, on the CPU, and image tokens [B, N, D] -> logits [L, V] of its targets.
    """
    require_candidates(candidates, len(input_ids), at_once)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    require_right_padding(mask)
    prompts = [row[:length] for row, length in zip(input_ids.cpu(), mask.sum(dim=1).tolist(), strict=True)]
    found: list[list[Tensor]] = [[] for _ in prompts]
    for start in range(0, max(map(len, candidates)), at_once):
        chunk = [of_row[start : start + at_once] for of_row in candidates]
        rows = [row for row, of_row in enumerate(chunk) if of_row]
        batch = rows_of([prompts[row] for row in rows], [chunk[row] for row in rows], image_token_id, pad_id)
        logits = logits_of(batch, None if image_features is None else image_features[rows])  # (L, V)
        assert batch.targets is not None, "candidates are labels"
        log_probs = -F.cross_entropy(logits.float(), batch.targets.to(logits.device), reduction="none")  # (L,)
        of_rows = iter(log_probs.split([len(tokens) for row in rows for tokens in chunk[row]]))
        for row in rows:
            found[row] += [next(of_rows).sum() for _ in chunk[row]]
    counts = [torch.tensor([len(tokens) for tokens in of_row]) for of_row in candidates]
    return Scores([torch.stack(sums) for sums in found], counts)
