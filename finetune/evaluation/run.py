"""Evaluate a run on its validation data: the base, the trained adapter or model, and the merged checkpoint.

Each of them is an arm. Its answers (results.json, in the official format) and its figures (metrics.json) are written to
OUTPUT/eval/ARM. With a limit nothing is written, unless a directory is named.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from data.invalid import NAMED, SkippedRecords
from data.records import decodable
from finetune import cli
from finetune.adapters.generation_config import max_new_tokens_of
from finetune.adapters.network import adapted_config
from finetune.config.schema import RunConfig
from finetune.evaluation.candidates import LEFT_OUT, Candidates, labels_of, read_candidates
from finetune.evaluation.checkpoint import open_and_evaluate, show_unfinished
from finetune.evaluation.inputs import INPUTS_KEY, file_digests, inputs_of_run, require_same_inputs
from finetune.evaluation.mixture import MixtureTask
from finetune.evaluation.score import Score
from finetune.evaluation.task_choice import task_of_source
from finetune.evaluation.tasks import CLASSIFY, TASKS, Record, Task, Value
from finetune.system import distributed
from finetune.system.console import show
from finetune.system.device import pick_device, pick_dtype
from finetune.system.lock import locked
from finetune.training.commits import at_commits
from finetune.training.examples import (
    askable,
    in_turns,
    joined,
    open_processor,
    open_sources,
    processor_of,
    require_paths,
    skipped_records,
)
from model import fetch

if TYPE_CHECKING:
    from datasets import Dataset


class Arm(NamedTuple):
    """A checkpoint to evaluate, and the adapter on it."""

    checkpoint: str | Path
    adapter: Path | None


def evaluate_run(
    config: RunConfig,
    words: Sequence[str],
    names: Sequence[str] = (),
    limit: int | None = None,
    output: Path | None = None,
    candidates: Path | None = None,
) -> dict[str, Score]:
    """The score of each arm, by the metric of the task.

    Args:
        words: the configuration's file and overrides, as they are on the command line.
        names: the arms to evaluate; all by default.
        limit: evaluate on the first questions only, those of several sources in turns.
        output: directory for answers and figures, instead of the run's own.
        candidates: a file of the answers that are allowed; by default answers are generated.

    Raises:
        ValueError: there is nothing to evaluate on, an arm is missing, or figures of other inputs would be overwritten.
    """
    if config.data.validation is None:
        raise ValueError(f"{words[0]} has no data.validation: nothing to evaluate on")
    allowed = read_candidates(candidates) if candidates else []
    require_paths(config, "validation")
    task = task_of(config)
    task.require()
    device = pick_device(config.model.device)
    distributed.init(device)
    config = at_commits(config)
    arms = arms_of(config, words, names)
    directory = output or (None if limit else Path(config.output, "eval"))
    with locked(directory / "eval.lock", directory, "evaluating") if directory else contextlib.nullcontext():
        inputs = inputs_of_run(config, limit) | file_digests(candidates=candidates)
        if directory:
            for name in arms:
                distributed.on_main(partial(require_same_inputs, directory / name, inputs))
        records = records_of_run(config, limit, listed=limit is None and output is None)
        task.require(records.remove_columns("image"))
        asked = Candidates(allowed) if allowed else Candidates(labels=labels_of_run(config))
        dtype, new_tokens = pick_dtype(config.model.dtype, device), new_tokens_of_run(config, noted=not allowed)
        return {
            name: evaluate_arm(config, name, arm, records, asked, dtype, device, new_tokens, directory, inputs)
            for name, arm in arms.items()
        }


def evaluate_arm(
    config: RunConfig,
    name: str,
    arm: Arm,
    records: Dataset,
    candidates: Candidates,
    dtype: torch.dtype,
    device: torch.device,
    new_tokens: int,
    directory: Path | None,
    inputs: dict[str, Any],
) -> Score:
    """The score of one arm. Its answers and figures are written to `directory`/`name`, if there is a directory."""
    checkpoint = fetch(arm.checkpoint, config.model.revision if arm.checkpoint == config.model.path else None)
    processor = processor_of(checkpoint, adapted_config(checkpoint, arm.adapter))
    quantize = None if name == "merged" else config.model.quantize
    rows = config.evaluation.batch_size
    task = task_of(config)
    result = open_and_evaluate(
        checkpoint, arm.adapter, processor, records, task, candidates, dtype, device, rows, new_tokens, quantize
    )
    if name != "base":
        show_unfinished(name, result, "evaluation.max_new_tokens")
    elif result.unfinished:  # no reason to raise the limit: it is that of the trained answers
        count = f"{result.unfinished:,} of {len(result.answers):,}"
        show(f"base: {count} answers are longer than {new_tokens} tokens, and cut off")
    if directory:
        facts = {"model": str(arm.checkpoint), "adapter": str(arm.adapter) if arm.adapter else None}
        facts |= {"validation": config.data.title("validation")}
        distributed.on_main(partial(result.save, directory / name, records, **facts, **{INPUTS_KEY: inputs}))
    return result.score


def task_of(config: RunConfig, split: str = "validation") -> Task:
    """What the run's answers to data.validation, or data.train (`split`), are judged by."""
    sources = config.data.sources(split) or config.data.sources("train")
    tasks = {source.called: task_of_source(source) for source in sources}
    return MixtureTask(tasks) if len(tasks) > 1 else next(iter(tasks.values()))


def worth_of(config: RunConfig, records: Iterable[Record] = ()) -> Value | None:
    """What an answer to an example of data.train is worth by the task of its source, 0 to 1; None where training does
    not ask for it.

    Raises:
        ValueError: a task says nothing of single answers; or as `Task.require` of these records.
    """
    if config.train.objective != "reward":
        return None
    for place, source in config.data.places("train").items():
        if (task := task_of_source(source)).value is None:
            others = ", ".join(name for name, other in TASKS.items() if other.value is not None)
            raise ValueError(
                f"{place}.task is {task.name}, whose {task.metric} judges answers together, and train.objective=reward "
                f"asks what a single one is worth: name one of {others}, or learn these examples in another run "
                "(train.objective: supervised)"
            )
    task = task_of(config, "train")
    task.require(records)
    return task.value


def arms_of(config: RunConfig, words: Sequence[str], names: Sequence[str]) -> dict[str, Arm]:
    """The arms that exist, or those of them that `names` asks for."""
    output = Path(config.output)
    trained = output / ("adapter" if config.lora else "model")
    arms: dict[str, Arm] = {}
    if config.model.weights == "pretrained":
        arms["base"] = Arm(config.model.path, None)
    if trained.exists():
        arms[trained.name] = Arm(config.model.path, trained) if config.lora else Arm(trained, None)
    if (output / "merged").exists():
        arms["merged"] = Arm(output / "merged", None)
    if names:
        if missing := [name for name in names if name not in arms]:
            raise ValueError(f"--arm {' '.join(missing)}: {output} has {', '.join(arms) or 'none yet'}; train it first")
        return {name: arms[name] for name in names}
    if not trained.exists():
        raise ValueError(
            f"{trained} does not exist: the run has no result yet. Train it to its end "
            f"({cli.command('train.py', *words)}), or evaluate something else with --arm base"
        )
    return arms


def records_of_run(config: RunConfig, limit: int | None, listed: bool) -> Dataset:
    """The validation records that can be evaluated. Those that cannot are listed in a file of the run, or shown."""
    skipped = skipped_records(config, "validation", listed=listed)
    if skipped.file:
        distributed.on_main(partial(skipped.file.unlink, missing_ok=True))  # from an earlier evaluation
    sources = open_sources(config, "validation", skipped)
    records = joined(sources)
    if limit is not None and limit < len(records):
        records = records.select(in_turns([len(source) for source in sources], limit))
    records = decodable(records, skipped)
    base = fetch(config.model.path, config.model.revision, weights=False)
    records = askable(records, open_processor(base, config), skipped)
    if skipped.reasons:
        show(f"{len(skipped.reasons):,} questions cannot be asked and are skipped")
        some = [f"  {name}: {reason}" for name, reason in list(skipped.reasons.items())[:NAMED]]
        show(*([f"  see {skipped.file}"] if skipped.file else some))
    return records


def labels_of_run(config: RunConfig) -> dict[str, list[str]]:
    """As `Candidates.labels`: of each validation source whose task is classify the right answers of the training source
    of that name, or of all training data where none has it. A line is shown where they cannot be read, or are too many.
    """
    sources = config.data.sources("validation")
    asked = [source.called for source in sources if task_of_source(source) is CLASSIFY]
    if not asked:
        return {}
    try:
        require_paths(config, "train")
        opened = open_sources(config, "train", SkippedRecords(share=math.inf))  # the training has named what it skips
    except ValueError as error:
        show(f"{LEFT_OUT}, labels are the right answers of data.train: {error}")
        return {}
    trained = {source.called: records for source, records in zip(config.data.sources("train"), opened, strict=True)}
    several = len(sources) > 1
    found: dict[str, list[str]] = {}
    for name in asked:
        try:
            found[name if several else ""] = labels_of(trained[name]) if name in trained else labels_of(*opened)
        except ValueError as error:
            show(f"{LEFT_OUT}: {error}")
    return found


def new_tokens_of_run(config: RunConfig, noted: bool) -> int:
    """The maximum number of tokens in an answer, for all arms: as configured, or as stored with the run's result.
    noted: whether a person is told what it was taken from.
    """
    configured, output = config.evaluation.max_new_tokens, Path(config.output)
    adapter = output / "adapter" if config.lora and (output / "adapter").exists() else None
    given = None if configured == "auto" else configured
    new_tokens, note = max_new_tokens_of(output / "model", adapter, given, "evaluation.max_new_tokens")
    if note and noted:
        show(note)
    return new_tokens
