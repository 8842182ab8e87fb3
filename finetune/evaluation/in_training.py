"""How good the network is while it trains: answers to a selection of the validation questions, and their loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from data import Processor
from data.records import decodable
from finetune.config.schema import RunConfig
from finetune.evaluation.evaluate import evaluate, mean_loss
from finetune.evaluation.mixture import figures
from finetune.evaluation.run import task_of
from finetune.system.progress import progress
from finetune.training.examples import drawn, open_examples
from finetune.training.tracking import Samples
from model import PaliGemma

if TYPE_CHECKING:
    from datasets import Dataset


def asked_in_training(config: RunConfig, processor: Processor) -> Dataset | None:
    """A fixed selection of the valid validation questions, whose images were decoded; None where the run has none."""
    if not config.evaluates:
        return None
    examples = open_examples(config, "validation", processor)
    records, skipped = examples.valid, examples.skipped
    if config.evaluation.count is not None and config.evaluation.count < len(records):
        records = drawn(records, examples.sizes_of_valid, config.evaluation.count, config.train.seed)
    records = decodable(records, skipped)
    task_of(config).require(records.remove_columns("image"))
    return records


def evaluation_of(
    config: RunConfig,
    model: PaliGemma,
    processor: Processor,
    records: Dataset | None,
    new_tokens: int,
    samples: Samples,
) -> Callable[[], dict[str, float]] | None:
    """What measures the model during training: loss and the metric of the task on these records; None without them.

    Args:
        new_tokens: the most that an answer may have.
        samples: keeps some of the answers.
    """
    if records is None:
        return None
    rows, task = config.evaluation.batch_size, task_of(config)

    def measure() -> dict[str, float]:
        answering, losing = progress("answering"), progress("loss of the answers")
        evaluated = evaluate(model, processor, records, task, new_tokens, batch_size=rows, progress=answering)
        samples.keep(records, evaluated.answers)
        loss = mean_loss(model, processor, records, rows, losing)
        return {"loss": loss, **figures(task, evaluated.score), "unfinished": evaluated.unfinished}

    return measure
