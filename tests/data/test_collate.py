"""Examples of different lengths become one right-padded batch."""

from typing import Any

import pytest
import torch

from data.collate import collate


def example(length: int, answer: int, **more: Any) -> dict[str, Any]:
    """`length` tokens of which the last `answer` are the suffix; token 0 occurs within, too."""
    ids = torch.arange(length)
    types = (ids >= length - answer).long()
    labels = torch.where(types == 1, ids, -100)
    return {
        "input_ids": ids,
        "token_type_ids": types,
        "labels": labels,
        "pixel_values": torch.full((3, 2, 2), length),
        **more,
    }


def test_rows_are_padded_on_the_right() -> None:
    batch = collate([example(3, 1, id="a", image_id="b"), example(5, 2, id="c", image_id="b")], pad_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items() if name != "pixel_values"} == {
        "input_ids": [[0, 1, 2, 9, 9], [0, 1, 2, 3, 4]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "token_type_ids": [[0, 0, 1, 0, 0], [0, 0, 0, 1, 1]],
        "labels": [[-100, -100, 2, -100, -100], [-100, -100, -100, 3, 4]],
    }
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3, 5]
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "attention_mask", "token_type_ids", "labels"))


def test_a_pad_token_within_a_row_is_no_padding() -> None:
    assert collate([example(3, 1), example(4, 1)], pad_id=0)["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("absent", ["labels", "pixel_values"])
def test_labels_and_pixels_are_in_all_examples_or_in_none(absent: str) -> None:
    examples = [example(3, 1), example(4, 1), example(5, 1)]
    del examples[1][absent]
    with pytest.raises(ValueError, match=f"2 of 3 examples have {absent}; expected all of them or none"):
        collate(examples, 0)
    del examples[0][absent], examples[2][absent]
    assert absent not in collate(examples, 0)


def test_rows_without_weights_count_once_beside_those_with_them() -> None:
    weighted = example(5, 3, loss_weights=torch.tensor([0, 0, 0.5, 0.25, 0.25]))
    batch = collate([example(3, 1), weighted], 0)
    assert batch["loss_weights"].tolist() == [[0, 0, 1, 0, 0], [0, 0, 0.5, 0.25, 0.25]]
    assert batch["loss_weights"].dtype == torch.float32
    assert "loss_weights" not in collate([example(3, 1)], 0)


def test_a_batch_needs_its_texts() -> None:
    with pytest.raises(ValueError, match="got no examples"):
        collate([], 0)
    broken = example(3, 1)
    del broken["token_type_ids"]
    with pytest.raises(ValueError, match="1 of 2 examples have token_type_ids"):
        collate([example(3, 1), broken], 0)
