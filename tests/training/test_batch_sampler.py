"""Which examples make up a step: a pure function of seed and step."""

from __future__ import annotations

from collections import Counter

import pytest

from finetune.training.batch_sampler import BatchSampler, RankShard, shuffled, steps_of_epochs, turns


def flat(sampler: BatchSampler) -> list[tuple[int, int]]:
    return [pair for batch in sampler for pair in batch]


def test_every_record_is_drawn_once_an_epoch_whatever_the_batch_size() -> None:
    total = steps_of_epochs(num_records=100, batch_size=7, epochs=2)
    pairs = flat(BatchSampler((100,), 7, seed=3, total=total))
    assert total == 29  # 200 / 7, rounded up
    assert Counter(pairs[:200]) == Counter((record, epoch) for record in range(100) for epoch in range(2))
    assert {epoch for _, epoch in pairs[200:]} == {2}


def test_a_step_depends_on_seed_and_number_alone() -> None:
    forwards = list(BatchSampler((50,), 8, seed=1, total=40))
    again = BatchSampler((50,), 8, seed=1, total=1000)
    assert [again[step] for step in reversed(range(40))] == forwards[::-1]
    assert list(BatchSampler((50,), 8, seed=2, total=40)) != forwards


def test_epochs_have_orders_of_their_own() -> None:
    orders = [shuffled(1000, 0, epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_the_batch_size_does_not_change_the_order() -> None:
    assert flat(BatchSampler((100,), 10, seed=5, total=20)) == flat(BatchSampler((100,), 25, seed=5, total=8))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shards_of_a_step_are_even_and_together_the_step(count: int) -> None:
    sampler = BatchSampler((50,), 7, seed=1, total=20)
    for step, *shards in zip(sampler, *(RankShard(sampler, rank, count) for rank in range(count)), strict=True):
        assert sorted(pair for shard in shards for pair in shard) == sorted(step)
        assert {len(shard) for shard in shards} <= {7 // count, -(-7 // count)}


def test_more_processes_than_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size=7 for 8 processes: .* launch 7 at most"):
        RankShard(BatchSampler((50,), 7, seed=1, total=20), 0, 8)


def test_without_weights_an_epoch_of_several_sources_draws_each_record_once() -> None:
    pairs = flat(BatchSampler((70, 20, 10), 10, seed=3, total=30))
    for epoch in range(3):
        drawn = Counter(pairs[100 * epoch : 100 * (epoch + 1)])
        assert drawn == Counter((record, epoch) for record in range(100))
    assert [record for record, _ in pairs[:100]] != [record for record, _ in pairs[100:200]]


def test_by_weights_every_step_has_its_share_of_each_source() -> None:
    """One of three examples from the second source, however small it is; its epochs go by the faster."""
    sampler = BatchSampler((900, 12), 9, seed=1, total=100, weights=(2, 1))
    assert sampler.shares == (2 / 3, 1 / 3)
    steps = [[record >= 900 for record, _ in step] for step in sampler]
    assert {sum(step) for step in steps} == {3}
    assert {tuple(sorted(step)) for step in steps} == {(False,) * 6 + (True,) * 3}
    assert Counter(pair for pair in flat(sampler) if pair[0] >= 900) == Counter(
        (900 + record, epoch) for record in range(12) for epoch in range(25)
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (1e-3, 5.0, 2.5, 0.3)])
def test_turns_keep_to_the_shares_and_go_on_as_they_began(weights: tuple[float, ...]) -> None:
    shares = tuple(weight / sum(weights) for weight in weights)
    sources, own = turns(shares, 5000)
    again = turns(shares, 77)
    assert again[0].tolist() == sources[:77].tolist()
    assert again[1].tolist() == own[:77].tolist()
    counts = [0] * len(shares)
    for drawn, (source, draw) in enumerate(zip(sources.tolist(), own.tolist(), strict=True), start=1):
        assert draw == counts[source]  # one after the other
        counts[source] += 1
        assert all(abs(count - drawn * share) < 2 for count, share in zip(counts, shares, strict=True))


def test_a_source_is_drawn_in_an_order_of_its_own() -> None:
    first, second = ([r % 50 for r, _ in flat(BatchSampler((50, 50), 2, 0, 50)) if r // 50 == s] for s in (0, 1))
    assert first == shuffled(50, 0, 0).tolist()
    assert sorted(second) == sorted(first)
    assert second != first


def test_weights_that_are_not_one_for_each_source_are_refused() -> None:
    for weights in ((1.0,), (1.0, 0.0), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="expected a positive one for each of 2 sources"):
            BatchSampler((5, 5), 2, 0, 5, weights)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(0,\) records in 5 steps of 8"):
        BatchSampler((0,), 8, 0, 5)
    with pytest.raises(IndexError, match="step 5 of 5"):
        BatchSampler((10,), 8, 0, 5)[5]
