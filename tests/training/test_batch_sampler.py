"""Which examples make up a step: a pure function of seed and step."""

from __future__ import annotations

from collections import Counter

import pytest

from finetune.training.batch_sampler import BatchSampler, RankShard


def flat(sampler: BatchSampler) -> list[tuple[int, int]]:
    return [pair for batch in sampler for pair in batch]


def test_every_record_is_drawn_once_an_epoch_whatever_the_batch_size() -> None:
    sampler = BatchSampler.for_epochs(num_records=100, batch_size=7, seed=3, epochs=2)
    pairs = flat(sampler)
    assert len(sampler) == 29  # 200 / 7, rounded up
    assert Counter(pairs[:200]) == Counter((record, epoch) for record in range(100) for epoch in range(2))
    assert {epoch for _, epoch in pairs[200:]} == {2}


def test_a_step_depends_on_seed_and_number_alone() -> None:
    forwards = list(BatchSampler(50, 8, seed=1, total=40))
    again = BatchSampler(50, 8, seed=1, total=1000)
    assert [again[step] for step in reversed(range(40))] == forwards[::-1]
    assert list(BatchSampler(50, 8, seed=2, total=40)) != forwards


def test_epochs_have_orders_of_their_own() -> None:
    sampler = BatchSampler(1000, 10, seed=0, total=300)
    orders = [sampler.order(epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_the_batch_size_does_not_change_the_order() -> None:
    assert flat(BatchSampler(100, 10, seed=5, total=20)) == flat(BatchSampler(100, 25, seed=5, total=8))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shards_of_a_step_are_even_and_together_the_step(count: int) -> None:
    sampler = BatchSampler(50, 7, seed=1, total=20)
    for step, *shards in zip(sampler, *(RankShard(sampler, rank, count) for rank in range(count)), strict=True):
        assert sorted(pair for shard in shards for pair in shard) == sorted(step)
        assert {len(shard) for shard in shards} <= {7 // count, -(-7 // count)}


def test_more_processes_than_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=7 for 8 processes: .* launch 7 at most"):
        RankShard(BatchSampler(50, 7, seed=1, total=20), 0, 8)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="0 records in 5 steps of 8"):
        BatchSampler(0, 8, 0, 5)
    with pytest.raises(IndexError, match="step 5 of 5"):
        BatchSampler(10, 8, 0, 5)[5]
