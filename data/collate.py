"""Examples -> one right-padded batch. Axes: B examples, S tokens of the longest, H and W pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORE_INDEX = -100  # cross-entropy ignores it


def collate(examples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Stacks the tensors of examples; other values of an example, such as strings, are not in the batch.

    Args:
        examples: with `input_ids` and `token_type_ids`, i64[S_i]; all or none with `labels`, i64[S_i]; all or none with
            `pixel_values`, f32[3, H, W], or with tiles f32[5, 3, H, W] (a batch is of rows with images, or of rows
            without); and some perhaps with `loss_weights`, f32[S_i].
        pad_id: fills `input_ids`; 0 fills `token_type_ids` and `loss_weights`, -100 `labels`.

    Returns:
        The same, i64[B, S] and f32[B, 3, H, W] or [B, 5, 3, H, W], and `attention_mask`, i64[B, S], 1 where no padding
        is. `loss_weights`, f32[B, S], where an example has them: beside it those of one without are 1 at its labels.

    Raises:
        ValueError: there are no examples, or they differ in what they hold.
    """
    if not examples:
        raise ValueError("got no examples; a batch needs at least one")
    if any("loss_weights" in example for example in examples):
        examples = [{"loss_weights": (example["labels"] != IGNORE_INDEX).float(), **example} for example in examples]
    fills = {"input_ids": pad_id, "token_type_ids": 0, "labels": IGNORE_INDEX, "loss_weights": 0, "pixel_values": 0}
    batch = {"attention_mask": [torch.ones_like(example["input_ids"]) for example in examples]}
    for name in fills:
        rows = [example[name] for example in examples if name in example]
        if len(rows) not in (0, len(examples)):
            raise ValueError(f"{len(rows)} of {len(examples)} examples have {name}; expected all of them or none")
        if rows:
            batch[name] = rows
    return {name: pad_sequence(rows, True, fills.get(name, 0)) for name, rows in batch.items()}
