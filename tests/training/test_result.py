"""Which step's weights are kept."""

from __future__ import annotations

from finetune.training.result import Result, judge


def test_a_result_that_was_chosen_by_another_metric_is_not_compared_with() -> None:
    """A run that is resumed after its task has changed."""
    before = Result(10, "best accuracy", "accuracy", 90.0, 0.1)
    assert judge(20, {"map": 3.0, "loss": 0.5}, "map", before) == Result(20, "best map", "map", 3.0, 0.5)
    assert judge(20, {"accuracy": 3.0, "loss": 0.5}, "accuracy", before) is None
