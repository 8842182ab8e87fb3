"""Which examples make up optimizer step k: a pure function of the seed and k.

The records are drawn in epochs, each in an order of its own; the steps cut that endless sequence into effective
batches, across the ends of epochs. So the state of the data in a checkpoint is one integer, and how a batch is cut into
micro-batches, on how many devices, changes nothing about what is learned.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """The effective batches of a run.

    Iterating gives `total` batches of (record, epoch): the index of a record, and the epoch, counted from 0, that it is
    drawn in. Which of a record's answers an epoch takes is the data set's business.
    """

    num_records: int
    batch_size: int
    seed: int
    total: int

    def __post_init__(self) -> None:
        if min(self.num_records, self.batch_size, self.total) < 1:
            raise ValueError(
                f"{self.num_records} records in {self.total} steps of {self.batch_size}: expected at least one of each"
            )

    @classmethod
    def for_epochs(cls, num_records: int, batch_size: int, seed: int, epochs: float) -> BatchSampler:
        """As many steps as `epochs` passes over the records take, the last one filled up."""
        return cls(num_records, batch_size, seed, max(1, math.ceil(round(epochs * num_records / batch_size, 6))))

    def __getitem__(self, step: int) -> list[tuple[int, int]]:
        """The (record, epoch) pairs of one step, counted from 0."""
        if not 0 <= step < self.total:
            raise IndexError(f"step {step} of {self.total}")
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        pairs = (divmod(position, self.num_records) for position in positions)
        return [(self.order(epoch)[position], epoch) for epoch, position in pairs]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self[step] for step in range(self.total))

    def __len__(self) -> int:
        return self.total

    def order(self, epoch: int) -> list[int]:
        """The order in which an epoch draws the records."""
        return shuffled(self.num_records, self.seed, epoch)


@dataclasses.dataclass(frozen=True)
class RankShard:
    """What one of `count` processes takes of each step: every count-th pair. Together they take all of it."""

    batch_sampler: BatchSampler
    rank: int
    count: int

    def __post_init__(self) -> None:
        batch_size = self.batch_sampler.batch_size
        if batch_size < self.count:
            raise ValueError(
                f"train.batch_size={batch_size} for {self.count} processes: each needs an example of every step; "
                f"launch {batch_size} at most, or make the steps larger"
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (pairs[self.rank :: self.count] for pairs in self.batch_sampler)

    def __len__(self) -> int:
        return len(self.batch_sampler)


@functools.lru_cache(maxsize=2)  # a step touches one epoch, or two at their border
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
