"""Which task judges the answers to a source of examples, also where its configuration leaves that open (`auto`)."""

from __future__ import annotations

from pathlib import Path

from data.sources.coco import contents_of
from finetune.config.source import Source
from finetune.evaluation.tasks import Task, task_named


def task_of_source(source: Source) -> Task:
    """The task that the source names; by default what its examples are made for, COCO's JSON by what is in it."""
    contents = contents_of(Path(source.coco)) if source.coco and source.task == "auto" else None
    return task_named(source.task, source.questions is not None, contents)
