"""`train.py --check`: every record looked at, every image decoded, every text tokenised."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from data.invalid import SkippedRecords
from data.records import decodable
from finetune.config.schema import RunConfig
from finetune.evaluation.run import task_of
from finetune.system.console import show
from finetune.training.examples import open_examples, open_processor, shared_images_note, skipped_records, valid
from model import fetch

if TYPE_CHECKING:
    from datasets import Dataset


def check(config: RunConfig) -> None:
    """Every record of training and validation looked at, every image decoded, every text tokenised; nothing is
    written.

    Raises:
        ValueError: more cannot be used than the configuration lets be skipped; all of them are listed in any case.
    """
    processor = open_processor(fetch(config.model.path, config.model.revision, weights=False), config)
    refused: list[str] = []
    opened = []
    for part in ("train", "validation") if config.data.validation else ("train",):
        skipped, total, usable = SkippedRecords(share=math.inf), 0, 0
        try:
            examples = open_examples(config, part, processor, skipped)
            records, longest = examples.records, examples.longest
            opened.append(records)
            good = valid(decodable(records, skipped), skipped)
            total, usable = len(records), len(good)
            show(f"data.{part}: the longest text has {longest.text:,} tokens, the longest answer {longest.answer:,}")
            if part == "validation":
                require_judgeable(config, good, refused)
        except ValueError:
            if not skipped.reasons:  # the file itself cannot be read
                raise
        count = len(skipped.reasons)
        show(f"data.{part}: {usable:,} records can be used, {count:,} cannot")
        show(*(f"  {name}: {reason}" for name, reason in skipped.reasons.items()))
        allowed = skipped_records(config, part, listed=False)
        if count > allowed.share * total:
            refused.append(f"{count:,} records of data.{part} cannot be used; {allowed.advice(count, usable + count)}")
        elif count:
            show(f"  that is within data.skip_at_most ({config.data.skip_at_most:.1%}): a run skips them")
    if len(opened) == 2 and (note := shared_images_note(*opened)):
        show(f"warning: {note}")
    if refused:
        raise ValueError("\n".join(refused))


def require_judgeable(config: RunConfig, records: Dataset, refused: list[str]) -> None:
    """Add to `refused` why the task cannot judge answers to these records, if it cannot."""
    try:
        task_of(config).require(records.remove_columns("image"))
    except ValueError as error:
        refused.append(f"data.validation: {error}")
