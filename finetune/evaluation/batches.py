"""A data set in batches, questions of one image side by side: each image passes the vision tower once for all of them.
A batch is of records with images, or of records of text alone.

Several processes share the images; where they share sharded layers, too, they compute equally many batches
(finetune/system/sharding.py). A batch that runs out of memory is repeated in halves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from data import Processor
from finetune.system import distributed, sharding
from finetune.system.device import first_line, free_memory, is_out_of_memory
from model import PaliGemma
from model.progress import Progress, silent

Record = Mapping[str, Any]
Result = TypeVar("Result")


@torch.inference_mode()
def in_batches(
    model: PaliGemma,
    processor: Processor,
    records: Sequence[Record],
    batch_size: int,
    work: Callable[[list[Record], Tensor | None], Result],
    progress: Progress = silent,
    positions: Sequence[int] | None = None,
) -> Iterator[Result]:
    """What `work` makes of all records, or of those at `positions`, batch by batch: of their rows and the image tokens
    [B, N, D] of their images, or None of rows of text alone, which come last.

    Questions of one image are side by side, so that each image passes the vision encoder once. Of several processes
    each has its share of the images, and of the rows of text alone. A batch that runs out of memory is repeated in
    halves, as are all after it.
    """
    model.eval()
    ids = [(record["image"] is None, record["image_id"]) for record in records]
    ordered = sorted((*ids[i], i) for i in (range(len(ids)) if positions is None else positions))
    images = list(dict.fromkeys(image_id for _, image_id, _ in ordered))
    mine = set(images[distributed.rank() :: distributed.count()])
    kept = [(is_text, i) for is_text, image_id, i in ordered if image_id in mine]
    batches = Batches([i for _, i in kept], batch_size, sum(not is_text for is_text, _ in kept))
    features: dict[str, Tensor] = {}
    for batch in progress(batches, len(batches)):
        rows = [records[i] for i in batch or [0]]  # an empty batch: others have one, and sharded layers need all
        try:
            with sharding.same_memory(model.language_model.model):
                features = encode_new(model, processor, rows, features)
                of_rows = [features[row["image_id"]] for row in rows if row["image"] is not None]
                result = work(rows, torch.stack(of_rows) if of_rows else None)
        except Exception as error:
            if not is_out_of_memory(error) or not batches.can_halve:
                raise
            reason = first_line(error)
        else:
            if batch:
                yield result
            continue
        features = {}
        free_memory(model.device)
        batches.halve(reason)


class Batches:
    """Indices in batches of `size`, none of which has some before `border` and some behind; one that was too large
    comes again, in halves.

    Processes that share sharded layers have equally many, of one size: the last ones may be empty.
    """

    def __init__(self, indices: list[int], size: int, border: int) -> None:
        self.indices, self.size, self.border, self.done, self.last = indices, size, border, 0, 0

    def __len__(self) -> int:
        return -(-self.border // self.size) - (-(len(self.indices) - self.border) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        while sharding.any_process(self.done < len(self.indices)):
            end = self.border if self.done < self.border else len(self.indices)
            batch = self.indices[self.done : min(self.done + self.size, end)]
            self.last = len(batch)
            self.done += len(batch)
            yield batch

    @property
    def largest(self) -> int:
        """The size of the batch at work, or of the largest one that a process may have."""
        return self.size if sharding.shards_layers() else self.last

    @property
    def can_halve(self) -> bool:
        return self.largest > 1

    def halve(self, reason: str) -> None:
        self.done -= self.last
        largest, self.size = self.largest, self.largest // 2
        warnings.warn(
            f"out of memory with {largest} questions at once ({reason}): repeated, and from here on {self.size} at "
            "once; a smaller evaluation.batch_size (--batch-size) saves the attempt",
            stacklevel=3,
        )


def encode_new(
    model: PaliGemma, processor: Processor, rows: list[Record], known: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Image tokens [N, D] of the rows' images, by id: those that are known, others encoded; no more are kept."""
    images = {row["image_id"]: row["image"] for row in rows if row["image"] is not None}
    features = {name: known[name] for name in images if name in known}
    if new := [name for name in images if name not in features]:
        pixels = torch.stack([processor.pixels(images[name]) for name in new])
        features |= zip(new, model.encode_images(pixels.to(model.device)), strict=True)
    return features
