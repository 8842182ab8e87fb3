"""`train.py --check`: every record looked at, every image decoded, every text tokenised."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from data import Processor
from data.invalid import SkippedRecords
from data.records import NoRecordsError, decodable
from finetune.config.schema import RunConfig
from finetune.evaluation.run import task_of, worth_of
from finetune.preflight.data_checks import prompt_check
from finetune.system.console import show
from finetune.training.examples import open_examples, open_processor, shared_images_note, skipped_records, valid
from model import fetch

if TYPE_CHECKING:
    from datasets import Dataset


def check(config: RunConfig) -> None:
    """Every record of training and validation looked at, every image decoded, every text tokenised; nothing is
    written.

    Raises:
        ValueError: a source cannot be read, or more of it cannot be used than the configuration lets be skipped; all
            of them, and all such records, are listed in any case.
    """
    processor = open_processor(fetch(config.model.path, config.model.revision, weights=False), config)
    refused: list[str] = []
    opened: list[Dataset] = []
    worth_of(config)
    for split in ("train", "validation") if config.data.validation else ("train",):
        skipped = SkippedRecords(share=math.inf)
        try:
            usable = usable_records(config, split, processor, skipped)
        except ValueError as error:
            show(*reasons_in(skipped))
            refused.append(f"data.{split}: {error}")
            continue
        opened += [usable] if usable else []
        if usable:
            require_judgeable(config, split, usable, refused)
        count, total = len(skipped.reasons), len(skipped.reasons) + len(usable or ())
        show(f"data.{split}: {total - count:,} records can be used, {count:,} cannot")
        show(*reasons_in(skipped))
        allowed = skipped_records(config, split, listed=False)
        if not usable or count > allowed.share * total:
            refused.append(f"{count:,} records of data.{split} cannot be used; {allowed.advice(count, total)}")
        elif count:
            show(f"  that is within data.skip_at_most ({config.data.skip_at_most:.1%}): a run skips them")
    if len(opened) == 2 and (note := shared_images_note(*opened)):
        show(f"warning: {note}")
    if refused:
        raise ValueError("\n".join(refused))


def require_judgeable(config: RunConfig, split: str, records: Dataset, refused: list[str]) -> None:
    """Add to `refused` why the task cannot judge answers to these records, if it cannot and has to."""
    texts = records.remove_columns("image")
    try:
        task_of(config).require(texts) if split == "validation" else worth_of(config, texts)
    except ValueError as error:
        refused.append(f"data.{split}: {error}")


def usable_records(config: RunConfig, split: str, processor: Processor, skipped: SkippedRecords) -> Dataset | None:
    """The records of a split that can be used, with a line about their lengths, or None where there are none; the
    others are added to `skipped`.

    Raises:
        ValueError: a source as a whole cannot be read, or of several sources one has none that can be used.
    """
    try:
        examples = open_examples(config, split, processor, skipped)
    except NoRecordsError:
        if len(config.data.sources(split)) > 1:
            raise
        return None
    longest = examples.longest
    show(f"data.{split}: the longest text has {longest.text:,} tokens, the longest answer {longest.answer:,}")
    usable = valid(decodable(examples.records, skipped), skipped)
    if not len(usable):
        return None
    if (prompts := prompt_check(usable)).outcome == "warning":
        show(f"data.{split}: {prompts}")
    return usable


def reasons_in(skipped: SkippedRecords) -> list[str]:
    """A line for each record that cannot be used."""
    return [f"  {name}: {reason}" for name, reason in skipped.reasons.items()]
