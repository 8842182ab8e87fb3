"""Evaluate one checkpoint, with or without an adapter, on files that the command line names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from data import Processor
from data.invalid import SkippedRecords
from data.records import decodable, load_records
from data.sources.hub import commit_of
from finetune import cli
from finetune.adapters.generation_config import max_new_tokens_of
from finetune.adapters.locate import find_adapter, find_base
from finetune.adapters.metadata import training_facts
from finetune.adapters.network import adapted_config
from finetune.adapters.storage import load_adapter
from finetune.config.source import SOURCE_PATHS, Source
from finetune.config.source_words import source_of
from finetune.evaluation.candidates import LEFT_OUT, Candidates, labels_of, read_candidates
from finetune.evaluation.evaluate import Evaluation, evaluate, unfinished_note
from finetune.evaluation.inputs import INPUTS_KEY, file_digests, first, inputs_of_source, require_same_inputs
from finetune.evaluation.score import Score
from finetune.evaluation.task_choice import task_of_source
from finetune.evaluation.tasks import CLASSIFY, Task
from finetune.lora.nf4 import open_base
from finetune.system import distributed
from finetune.system.console import show
from finetune.system.device import pick_device, pick_dtype
from finetune.system.paths import written
from finetune.system.progress import progress
from finetune.training.examples import askable, processor_of
from model import fetch

if TYPE_CHECKING:
    from datasets import Dataset

SEED = 0  # draws the examples of a source that asks for some of them, as train.seed does by default


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """The options of `evaluate.py --model`. Needs `model` or `adapter`, and official files, `jsonl` or `source`."""

    model: str | None
    revision: str | None
    adapter: Path | None
    questions: str | None
    annotations: str | None
    images: str | None
    jsonl: str | None
    source: Sequence[str] | None
    task: str
    prompt: str | None
    limit: int | None
    output: Path | None
    batch_size: int
    max_new_tokens: int | None
    dtype: str
    quantize: str
    device: str
    candidates: Path | None

    @property
    def examples(self) -> Source:
        """What is asked, at its commit where it is on the Hub. ValueError where `source` is no source of examples."""
        given = {key: path for key in SOURCE_PATHS if (path := getattr(self, key, None)) is not None}
        words = [f"{key}={json.dumps(written(path))}" for key, path in given.items()]
        source = source_of(words if self.source is None else self.source, "--source")
        if self.task != "auto":
            source = source.model_copy(update={"task": self.task})
        if source.hub is None:
            return source
        return source.model_copy(update={"revision": commit_of(source.hub, source.subset, source.revision)})


def evaluate_checkpoint(options: CheckpointOptions, default_prompt: str) -> dict[str, Score]:
    """The score, under the name "adapter" or "model"; answers and figures are written to `options.output`.

    default_prompt: for official questions, if neither `options` nor the adapter has a prompt.

    Raises:
        ValueError: files, checkpoint or adapter cannot be used, or `options.output` holds figures of other inputs.
    """
    allowed = read_candidates(options.candidates) if options.candidates else ()
    source = options.examples
    adapter = find_adapter(options.adapter) if options.adapter else None
    model, revision = options.model, options.revision
    if model is None:
        assert adapter is not None, "the options have a model or an adapter"
        model, revision = find_base(adapter)
    task = task_of_source(source)
    task.require()
    prompt = None if options.jsonl else choose_prompt(adapter, options.prompt, default_prompt)
    facts = {"model": model, "adapter": str(adapter) if adapter else None, "prompt": prompt}
    inputs = facts | inputs_of_source(source, SEED) | {"limit": options.limit}
    inputs |= file_digests(candidates=options.candidates)
    device = pick_device(options.device)
    distributed.init(device)
    if options.output:
        distributed.on_main(partial(require_same_inputs, options.output, inputs))
    records = open_source(source, options.limit, prompt or default_prompt)
    dtype = pick_dtype(options.dtype, device)
    directory = fetch(model, revision)
    new_tokens, note = max_new_tokens_of(directory, adapter, options.max_new_tokens, "--max-new-tokens")
    if note and not allowed:
        show(note)
    quantize = cli.quantization(options.quantize, adapter)
    processor = processor_of(directory, adapted_config(directory, adapter))
    if processor.image_form.aspect == "pad":  # only now is it known that locations are those of the square
        records = open_source(source, options.limit, prompt or default_prompt, "pad")
    records = askable(records, processor, SkippedRecords())
    task.require(records.remove_columns("image"))
    candidates = Candidates(allowed, {} if allowed or task is not CLASSIFY else labels_among(records))
    rows = options.batch_size
    result = open_and_evaluate(
        directory, adapter, processor, records, task, candidates, dtype, device, rows, new_tokens, quantize
    )
    show_unfinished(str(adapter or model), result, "--max-new-tokens")
    if options.output:
        distributed.on_main(partial(result.save, options.output, records, **facts, **{INPUTS_KEY: inputs}))
    show(f"model: {model}", *([f"adapter: {adapter}"] if adapter else []))  # a path would not fit into the table
    return {"adapter" if adapter else "model": result.score}


def labels_among(records: Dataset) -> dict[str, list[str]]:
    """As `Candidates.labels`: the right answers of the records. A line is shown where they are too many."""
    try:
        return {"": labels_of(records)}
    except ValueError as error:
        show(f"{LEFT_OUT}: {error}")
        return {}


def choose_prompt(adapter: Path | None, given: str | None, default: str) -> str:
    """The prompt for the questions: as given, else as the adapter was trained; a line is shown if the two differ."""
    trained = training_facts(adapter).prompt if adapter else None
    if given is None:
        return trained or default
    if trained not in (None, given):
        show(f"the adapter was trained with the prompt {trained!r}; --prompt asks {given!r}")
    return given


def open_source(source: Source, limit: int | None, prompt: str, aspect: Literal["squash", "pad"] = "squash") -> Dataset:
    """The records to evaluate on, with locations as `aspect` says."""
    given = source.model_dump(exclude={"task", "name", "weight"})
    return decodable(first(load_records(**given, prompt=prompt, seed=SEED, aspect=aspect), limit))


def open_and_evaluate(
    directory: Path,
    adapter: Path | None,
    processor: Processor,
    records: Dataset,
    task: Task,
    candidates: Candidates,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    max_new_tokens: int,
    quantize: str | None,
) -> Evaluation:
    """Open a model, evaluate it, and free it on return: two models would not fit on a small GPU."""
    for text in candidates.texts:
        processor.answer_ids(text)  # one that is refused, before minutes are spent on opening a network
    model = open_base(directory, dtype, device, quantize)
    if adapter:
        load_adapter(model, adapter)
    shown = progress("answering")
    return evaluate(model, processor, records, task, max_new_tokens, candidates, batch_size=batch_size, progress=shown)


def show_unfinished(name: str, result: Evaluation, option: str) -> None:
    """Show how many answers were cut off by `option`, if any were."""
    if note := unfinished_note(result.unfinished, len(result.answers), result.max_new_tokens, option):
        show(f"{name}: {note}")
