"""Which examples make up optimizer step k: a pure function of the seed and k.

The records of a source are drawn in epochs, each in an order of its own. Several sources take turns: source s has its
draw j, counted from 0, at time (j + 1/2) / share, and all draws are taken in the order of their times. So of the first
n draws every source has its share to within one or two, and where the shares are those of the records, an epoch draws
each record once. The steps cut that endless sequence into effective batches, across the ends of epochs. So the state of
the data in a checkpoint is one integer, and how a batch is cut into micro-batches, on how many devices, changes nothing
about what is learned.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BatchSampler:
    """The effective batches of a run.

    Iterating gives `total` batches of (record, epoch): the index of a record, and the epoch of its source, counted from
    0, that it is drawn in. Which of a record's answers an epoch takes is the data set's business.

    Attributes:
        sizes: the number of records of each source; the indices of a source follow those of the one before it.
        batch_size: examples of a step.
        seed: of the orders.
        total: steps.
        weights: how often the sources are drawn, relative to each other; none: as often as they have records.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int
    total: int
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if min(*self.sizes, self.batch_size, self.total) < 1:
            raise ValueError(
                f"{self.sizes} records in {self.total} steps of {self.batch_size}: expected at least one of each"
            )
        if self.weights and (len(self.weights) != len(self.sizes) or min(self.weights) <= 0):
            raise ValueError(
                f"weights are {self.weights}; expected a positive one for each of {len(self.sizes)} sources"
            )

    @property
    def num_records(self) -> int:
        """Of all sources: so many draws are an epoch of the run."""
        return sum(self.sizes)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all draws, the share of each source."""
        weights = self.weights or self.sizes
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def never_drawn(self) -> list[int]:
        """The positions of the sources that the run takes no example of."""
        if len(self.sizes) == 1:
            return []
        drawn = set(turns(self.shares, self.total * self.batch_size)[0].unique().tolist())
        return [source for source in range(len(self.sizes)) if source not in drawn]

    def __getitem__(self, step: int) -> list[tuple[int, int]]:
        """The (record, epoch) pairs of one step, counted from 0."""
        if not 0 <= step < self.total:
            raise IndexError(f"step {step} of {self.total}")
        return [self.draw(position) for position in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self[step] for step in range(self.total))

    def __len__(self) -> int:
        return self.total

    def draw(self, position: int) -> tuple[int, int]:
        """The record of one draw, counted from 0 over all steps, and the epoch of its source."""
        source, own = 0, position
        if len(self.sizes) > 1:
            source, own = (int(found[position]) for found in turns(self.shares, self.total * self.batch_size))
        epoch, place = divmod(own, self.sizes[source])
        order = shuffled(self.sizes[source], self.seed, epoch, source)
        return sum(self.sizes[:source]) + int(order[place]), epoch


def steps_of_epochs(num_records: int, batch_size: int, epochs: float) -> int:
    """As many steps as `epochs` passes over the records take, the last one filled up."""
    return max(1, math.ceil(round(epochs * num_records / batch_size, 6)))


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


@functools.lru_cache(maxsize=1)
def turns(shares: tuple[float, ...], count: int) -> tuple[Tensor, Tensor]:
    """Of the first `count` draws from several sources: whose each is, and which of its source's, both i64[count]. More
    draws begin with the same ones.
    """
    # In a time t a source has at most t * share + 1/2 draws, and `count` draws are over before count + sources / 2.
    own = [torch.arange(math.ceil((count + len(shares)) * share) + 1) for share in shares]
    times = torch.cat([(draws.double() + 0.5) / share for draws, share in zip(own, shares, strict=True)])
    order = torch.argsort(times, stable=True)[:count]  # of two at one time, the source that is named first
    sources = torch.cat([torch.full_like(draws, source) for source, draws in enumerate(own)])
    return sources[order], torch.cat(own)[order]


@functools.lru_cache(maxsize=32)  # a step touches one epoch of a source, or two at their border
def shuffled(count: int, seed: int, epoch: int, source: int = 0) -> Tensor:
    """The order i64[count] in which an epoch draws the records of a source."""
    # Of a seed the generator uses 32 bits; the last factor spreads the sources over these.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + source * 2_654_435_761) % 2**63)
    return torch.randperm(count, generator=generator)
