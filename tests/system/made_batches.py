"""Batches of worker processes, for tests/system/test_workers.py; as a program, which imports little, counts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from finetune.system import workers

SIZE = 64  # examples in a batch, as by default
SIDE = 64  # pixels: a batch is 3 MiB


class Made(Dataset[dict[str, Any]]):
    """Example i, whose tensors say so; two of them share an image."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        texts = {name: torch.full((20 + i % 3,), i) for name in ("input_ids", "token_type_ids", "labels")}
        pixels = torch.full((3, SIDE, SIDE), float(i // 2))
        return {**texts, "pixel_values": pixels, "id": str(i), "image_id": str(i // 2)}


def batches(count: int, examples: Dataset[Any], processes: int) -> list[list[dict[str, Any]]]:
    wanted = [range(start * SIZE, (start + 1) * SIZE) for start in range(count)]
    return list(workers.loader(examples, wanted, processes))


def count(_: Sequence[str] = ()) -> None:
    torch.set_num_threads(1)
    print(sum(len(batch) for batch in batches(8, Made(), 4)), "examples")


if __name__ == "__main__":
    count()
