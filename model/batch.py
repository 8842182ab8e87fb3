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
        position_ids: i64 [B, S], of the rotary embedding.
        image_positions: i64 [B, N], where the image tokens stand in each row; N may be 0.
        query_positions: i64 [B, U], the positions that the last layer computes: those that predict a label, and in
            rows with fewer of them than others, further ones to fill up. None without labels: all are computed.
        predicting: i64 [L], of each label, row by row, which of the B * U query positions predicts it. The first tokens
            of all suffixes of a row are predicted by the same one.
        targets: i64 [L], those labels.
        weights: f32 [L], what the loss of each counts; None: 1 each.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    image_positions: Tensor
    query_positions: Tensor | None = None
    predicting: Tensor | None = None
    targets: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def of(
        cls,
        image_token_id: int,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> TokenBatch:
        """Checked on the CPU, where it stays; arguments as in `PaliGemma.forward`, on any device.

        Raises:
            ValueError: rows not padded on the right or with image tokens of different number, types that are not those
                of a prefix and its suffixes, labels without types or all ignored, weights that are not above 0.
        """
        ids = input_ids.cpu()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids.cpu()
        if labels is not None and token_type_ids is None:
            raise ValueError(
                "labels need token_type_ids (0 prefix, 1 suffix): without them the answer leaks into the prefix"
            )
        if loss_weights is not None and labels is None:
            raise ValueError("loss_weights weigh the loss of labels, and there are none: give labels too")
        if not bool(mask[:, 0].all()):
            raise ValueError("attention_mask starts with padding: rows must be padded on the right")
        require_suffixes(types, mask)
        position_ids, predicted_by = token_positions(types)
        # An <image> within a suffix is one that the network wrote, as it may write any token, and stands for no image.
        prefix = ids.masked_fill(types != 0, -1)
        batch = cls(ids, mask, types, position_ids, image_positions(prefix, image_token_id))
        if labels is None:
            return batch
        weights = None if loss_weights is None else loss_weights.cpu()
        return dataclasses.replace(batch, **supervision(labels.cpu(), predicted_by, weights))

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


def require_suffixes(token_type_ids: Tensor, attention_mask: Tensor) -> None:
    """ValueError where the types [B, S] of a row are not 0 first, then 1, 2, ..., each side by side."""
    steps = token_type_ids.diff(dim=1)  # (B, S-1)
    wrong = ((steps != 0) & (steps != 1) & attention_mask[:, 1:].bool()).any(dim=1) | (token_type_ids[:, 0] != 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        found = token_type_ids[row][attention_mask[row].bool()].unique_consecutive().tolist()
        raise ValueError(
            f"the token_type_ids of row {row} read {found}, each number side by side; expected 0 (image and prefix), "
            "then 1, 2 and so on, a number for each suffix, and at least one token of each"
        )


def token_positions(token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens of rows with these types [B, S], both i64 [B, S]:

    Returns:
        position_ids: counted from 1, as published models do. Every suffix begins behind the prefix, as in a row of its
            own.
        predicted_by: the slot whose output predicts a token: the one before it; of a suffix's first token, the last of
            the prefix.
    """
    slots = torch.arange(token_type_ids.shape[1]).expand_as(token_type_ids)
    begins = token_type_ids.diff(dim=1, prepend=token_type_ids[:, :1]) > 0  # (B, S): whether a suffix begins here
    prefix = begins.int().argmax(dim=1, keepdim=True)  # (B, 1): slots before the first suffix; 0 without any
    began = (slots * begins).cummax(dim=1).values  # (B, S): where the suffix of a token begins
    earlier = (began - prefix) * (token_type_ids != 0)  # (B, S): tokens of the suffixes before it
    return slots + 1 - earlier, torch.where(begins, prefix, slots) - 1


def supervision(labels: Tensor, predicted_by: Tensor, loss_weights: Tensor | None) -> dict[str, Tensor]:
    """`query_positions`, `predicting`, `targets` and, where there are any, `weights` of labels i64 [B, S]."""
    supervised = labels != IGNORE_INDEX
    supervised[:, 0] = False  # nothing predicts the first token
    rows, tokens = supervised.nonzero(as_tuple=True)  # (L,) each, row by row
    if not len(rows):
        raise ValueError("labels hold no supervised position: their loss is not a number; drop such rows")
    sources = predicted_by[rows, tokens]  # (L,)
    predicts = torch.zeros_like(supervised)
    predicts[rows, sources] = True
    most = int(predicts.sum(dim=1).max())
    # Each row's own positions first, filled up with others.
    positions = predicts.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # (B, U)
    order = predicts.cumsum(dim=1) - 1  # (B, S): of a position among its row's own
    found = {
        "query_positions": positions,
        "predicting": rows * most + order[rows, sources],
        "targets": labels[rows, tokens],
    }
    if loss_weights is None:
        return found
    weights = loss_weights[rows, tokens]
    if len(wrong := weights[~((weights > 0) & weights.isfinite())]):
        raise ValueError(
            f"loss_weights hold {wrong[0]:g} at a supervised position; expected numbers above 0: leave out a suffix "
            "that should not count"
        )
    return {**found, "weights": weights}
