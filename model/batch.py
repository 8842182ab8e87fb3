"""A checked batch of rows, with every position that the network will gather or scatter.

What depends on the values of a batch (where image tokens stand, which positions are supervised, whether rows are padded
on the right) is computed on the CPU, where the ids are, and moves to the device with them. Computed on a card, each of
these values would make the host wait until the card has finished its queue.

Axes: B batch, S sequence, N image tokens, U query positions of the last
layer, L supervised positions, D hidden.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a position that is not supervised


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Right-padded rows, on one device; made by `of`.

    Attributes:
        input_ids, attention_mask, token_type_ids: i64 [B, S], as in `PaliGemma.forward`.
        image_positions: i64 [B, N], where the image tokens stand in each row; N may be 0.
        query_positions: i64 [B, U], the positions that the last layer computes: those that predict a label, and in
            rows with fewer of them than others, further ones to fill up. None without labels: all are computed.
        predicting: i64 [L], which of the B * U query positions predict a label, row by row.
        targets: i64 [L], those labels.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    image_positions: Tensor
    query_positions: Tensor | None = None
    predicting: Tensor | None = None
    targets: Tensor | None = None

    @classmethod
    def of(
        cls,
        image_token_id: int,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> TokenBatch:
        """Checked on the CPU, where it stays; arguments as in `PaliGemma.forward`, on any device.

        Raises:
            ValueError: rows not padded on the right or with image tokens of different number, labels without types or
                all ignored.
        """
        ids = input_ids.cpu()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids.cpu()
        if labels is not None and token_type_ids is None:
            raise ValueError(
                "labels need token_type_ids (0 prefix, 1 suffix): without them the answer leaks into the prefix"
            )
        if not bool(mask[:, 0].all()):
            raise ValueError("attention_mask starts with padding: rows must be padded on the right")
        batch = cls(ids, mask, types, image_positions(ids, image_token_id))
        return batch if labels is None else dataclasses.replace(batch, **supervision(labels.cpu()))

    def to(self, device: torch.device) -> TokenBatch:
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def image_positions(input_ids: Tensor, image_token_id: int) -> Tensor:
    """i64 [B, N]: where each row's image tokens stand. Raises ValueError where rows differ in their number."""
    is_image = input_ids == image_token_id
    counts = is_image.sum(dim=1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"the {len(counts)} rows hold {counts} image tokens; expected as many in each")
    return is_image.nonzero()[:, 1].view(len(counts), -1)


def supervision(labels: Tensor) -> dict[str, Tensor]:
    """`query_positions`, `predicting` and `targets` of labels i64 [B, S]: a position predicts the next one's label."""
    supervised = labels[:, 1:] != IGNORE_INDEX  # (B, S-1), at the positions that predict
    counts = supervised.sum(dim=1, keepdim=True)
    if not (most := int(counts.max())):
        raise ValueError("labels hold no supervised position: their loss is not a number; drop such rows")
    # Each row's own positions first, filled up with others.
    positions = supervised.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, U)
    own = torch.arange(most) < counts  # (B, U)
    return {
        "query_positions": positions,
        "predicting": own.flatten().nonzero()[:, 0],
        "targets": labels[:, 1:][supervised],
    }
