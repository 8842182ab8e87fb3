"""How likely a network takes the answers of rows that hold several of them, each a suffix of its own.

Axes: B rows, K answers of a row, L supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.training.step_inputs import Example, ImageFeatures, StepInputs, micro_batches
from model import TokenBatch


def tokens_of(examples: Sequence[Example]) -> Tensor:
    """i64 [B, K]: how many tokens each answer of a row has, `<eos>` included; all rows have as many answers."""
    return torch.stack([example["token_type_ids"].bincount()[1:] for example in examples])


def answer_log_probs(logits: Tensor, batch: TokenBatch, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each answer, [B, K], in nats: the sum over its tokens, by softmax(logits / temperature).

    Args:
        logits: [L, V] of the targets of `batch`.
        tokens: i64 [B, K] on the CPU, how many each answer has.
    """
    assert batch.targets is not None, "answers are labels"
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    exact = exact if temperature == 1 else exact / temperature
    log_probs = -F.cross_entropy(exact, batch.targets, reduction="none")  # (L,)
    return torch.stack([part.sum() for part in log_probs.split(tokens.flatten().tolist())]).view(tokens.shape)


def logits_of(inputs: StepInputs, rows: Sequence[Example], images: ImageFeatures | None) -> tuple[Tensor, TokenBatch]:
    """Logits [L, V] that predict the answers of a micro-batch, and its tokens."""
    batch, image_features = inputs.inputs_of(rows, images, step=0)
    return inputs.network.supervised_logits(batch, image_features), batch


def log_probs_by_id(
    inputs: StepInputs, examples: Sequence[Example], images: ImageFeatures | None, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Log-probabilities f64 [K] of the answers of each example, by its id, on the CPU; by the network as it is now."""
    found: dict[str, Tensor] = {}
    for rows in micro_batches(examples, inputs.execution_plan.micro_batch):
        logits, batch = logits_of(inputs, rows, images)
        log_probs = answer_log_probs(logits, batch, tokens_of(rows), temperature).cpu().double()
        found |= zip((row["id"] for row in rows), log_probs, strict=True)
    return found
