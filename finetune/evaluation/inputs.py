"""Which inputs the figures in a directory belong to: figures of other inputs are never overwritten.

metrics.json holds the inputs under INPUTS_KEY: size and sha256 of each file, what selects the questions, the prompt and
the limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.sources import source_contents
from finetune.config.schema import RunConfig
from finetune.config.source import Source
from finetune.evaluation.evaluate import METRICS_FILE
from finetune.evaluation.task_choice import task_of_source
from finetune.system.atomic import describe, describe_all

if TYPE_CHECKING:
    from datasets import Dataset

INPUTS_KEY = "made_of"


def inputs_of_run(config: RunConfig, limit: int | None) -> dict[str, Any]:
    """What determines the validation questions of a run, and the prompt they are put in."""
    sources = config.data.sources("validation")
    found = {source.called: inputs_of_source(source, config.train.seed) for source in sources}
    of_several = {f"source {name}": about for name, about in found.items()}  # a source may be called prompt
    inputs: dict[str, Any] = of_several if len(sources) > 1 else next(iter(found.values()))
    if config.data.validation == "auto":
        inputs |= {"held_out_by": config.train.seed}
    return inputs | {"prompt": config.data.prompt, "limit": limit}


def inputs_of_source(source: Source, seed: int) -> dict[str, Any]:
    """What determines the records of a source."""
    inputs: dict[str, Any] = {key: describe_all(*of) for key, of in source_contents(source.model_dump()).items()}
    # Of COCO's JSON the task itself: what auto meant there has changed.
    inputs |= {"task": task_of_source(source).name if source.coco else source.task, "columns": source.columns}
    inputs |= source.model_dump(include={"hub", "subset", "revision"}) if source.hub else {}
    inputs |= {"text_rows": True} if source.text_rows else {}
    inputs |= {"split": source.split} if source.split and not source.questions else {}
    if source.fraction is not None or source.count is not None:
        inputs |= source.model_dump(include={"fraction", "count", "sample_by"}) | {"seed": seed}
    return inputs


def file_digests(**files: str | Path | None) -> dict[str, Any]:
    """Size and sha256 of the files that exist. Whoever opens a missing one reports it."""
    return {name: describe(Path(file)) for name, file in files.items() if file and Path(file).is_file()}


def require_same_inputs(directory: Path, inputs: Mapping[str, Any]) -> None:
    """ValueError if the directory holds figures of other inputs than these."""
    try:
        before = json.loads((directory / METRICS_FILE).read_text(encoding="utf-8"))[INPUTS_KEY]
    except (OSError, ValueError, KeyError, TypeError):  # no figures, or written before inputs were recorded
        return
    if changed := [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]:
        raise ValueError(
            f"{directory} holds figures of something else ({', '.join(changed)} differ): write to another directory "
            "with --output, or delete it"
        )


def first(records: Dataset, limit: int | None) -> Dataset:
    """The first `limit` records; all of them if it is None."""
    return records if limit is None else records.select(range(min(limit, len(records))))
