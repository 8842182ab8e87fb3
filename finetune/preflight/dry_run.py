"""`train.py --dry-run`: what a run would take, and whether it fits, before anything is loaded."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from data import collate
from data.text_rows import names_image
from finetune.config.schema import RunConfig
from finetune.config.stages import runs_of, without_stages
from finetune.preflight.plan import GIB, Plan, Planner
from finetune.preflight.probe import StepWorkload, images_per_step, time_step
from finetune.preflight.run_plan import RunPlan, assumed_lengths, plan_run, require_fit, spill_warning
from finetune.system.console import new_table, show
from finetune.system.device import pick_device
from finetune.training.batch_sampler import BatchSampler
from finetune.training.examples import (
    Examples,
    max_new_tokens,
    network_config,
    open_examples,
    open_processor,
    require_paths,
)
from finetune.training.setup import (
    adapt,
    image_note,
    plan_steps,
    random_model,
    require_starts,
    shortness_note,
    start_note,
    table_of_adapters,
)
from model import PaliGemmaConfig, fetch
from model.safetensors_io import refuse_unreadable


def dry_run(config: RunConfig, probed: bool) -> None:
    """What the run and its stages would take, from the configuration and config.json alone; of weights only headers are
    read.

    probed: time the phases of a step as well.

    Raises:
        ValueError: one of them does not fit; says what to change.
    """
    directory = fetch(config.model.path, config.model.revision, weights=False)
    dimensions = network_config(directory, config)
    require_readable(config, directory)
    examples, problem = readable_examples(config, directory)
    *stages, run = runs_of(config)
    for stage in stages:
        show(f"stage {Path(stage.output).name}: the connector alone, in {stage.output}")
        dry_run_one(stage, directory, dimensions, examples, problem, probed)
    if stages:
        show(f"the run itself, in {run.output}")
    dry_run_one(run, directory, dimensions, examples, problem, probed)


def dry_run_one(
    config: RunConfig,
    directory: Path,
    dimensions: PaliGemmaConfig,
    examples: Examples | None,
    problem: str | None,
    probed: bool,
) -> None:
    """What a stage, or the run itself, would take. ValueError where it does not fit. problem: why there are no
    examples.
    """
    planned = plan_run(config, dimensions, examples.longest if examples else assumed_lengths(config))
    planner, plan = planned.planner, planned.plan
    show(table_of_adapters(planner.model))
    show(image_note(dimensions))
    if note := start_note(config):
        show(note)
    show(table_of_memory(planned))
    steps, workload = workload_of(config, planner, examples)
    source = "the longest of the data" if examples else "assumed: the data cannot be read"
    source += ", taken to have an image" if workload.texts else ""
    show(f"rows of {planner.tokens} tokens, answers of {planner.supervised} ({source}); {plan.execution}")
    tflop = tflop_of_example(planner, plan, workload)
    of_run = f", {three_digits(tflop * workload.examples * steps.total)} for the run" if steps else ""
    text_rows = f", {workload.tokens - dimensions.num_image_tokens} without an image" if workload.texts else ""
    show(
        f"{three_digits(tflop)} TFLOP an example in rows of {workload.tokens} tokens{text_rows}, answers of "
        f"{workload.supervised}{of_run}"
    )
    if config.data.validation is not None:
        new_tokens = max_new_tokens(config, examples.lengths) if examples else planner.answer
        planned_evaluation(config, planned, new_tokens)
    if warning := spill_warning(planner.device):
        show(f"warning: {warning}")
    require_fit(config, planned)
    unread = "it fits where no text is longer than assumed; but a run cannot start, for its data cannot be read: "
    show("it fits" if examples else f"{unread}{problem}")
    if probed:
        show_step_time(config, directory, plan, workload, steps)


def require_readable(config: RunConfig, directory: Path) -> None:
    """ValueError where the base cannot be opened, or what the run starts from does not fit it, by their headers. What
    its stages are yet to make is not there to be looked at.
    """
    if config.model.weights == "pretrained":
        refuse_unreadable(directory)
    resumes = any(Path(config.output, "checkpoints").glob("step-*"))  # and does not read what it started from
    if not resumes:
        require_starts(directory, without_stages(config))


def table_of_memory(planned: RunPlan) -> Table:
    plan = planned.plan
    table = new_table("component", "GiB", title=f"memory on {planned.planner.device}")
    for name, size in plan.components.items():
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_row("total", f"{plan.total / GIB:.3f}")
    table.add_row(f"budget: {planned.budget_source}", f"{plan.budget / GIB:.3f}")
    return table


def readable_examples(config: RunConfig, directory: Path) -> tuple[Examples | None, str | None]:
    """The examples of the run; or None, and why they cannot be read: a card can be planned for where no data are."""
    try:
        require_paths(config, "train")
        return open_examples(config, "train", open_processor(directory, config)), None
    except ValueError as error:
        show(f"steps and lengths are not known, for the data cannot be read: {error}")
        return None, str(error)


def workload_of(
    config: RunConfig, planner: Planner, examples: Examples | None
) -> tuple[BatchSampler | None, StepWorkload]:
    """The steps, where the data can be read, and what each is made of, in rows of mean length."""
    size = config.train.batch_size
    if examples is None:
        return None, StepWorkload(size, size, planner.tokens, planner.supervised)
    records, lengths = examples.records, examples.lengths
    steps = plan_steps(config, examples.sizes)
    image_ids = records["image_id"][:]
    images, texts = images_per_step(steps, image_ids), 1 - sum(map(names_image, image_ids)) / len(image_ids)
    show(f"{len(records):,} examples, {steps.total:,} steps, up to {steps.total * size * planner.tokens:,} tokens")
    if note := shortness_note(steps):
        show(f"warning: {note}")
    tokens = planner.config.num_image_tokens + 1 + math.ceil(lengths.mean_text)
    return steps, StepWorkload(size, images, tokens, math.ceil(lengths.mean_supervised), texts)


def tflop_of_example(planner: Planner, plan: Plan, workload: StepWorkload) -> float:
    """TFLOP of an example, on average over those with an image and those without."""

    def of_rows(tokens: int, images: float) -> float:
        return planner.tflop_of_length(plan.execution, tokens, workload.supervised, images)

    found = of_rows(workload.tokens, workload.images / workload.examples)
    if not workload.texts:
        return found
    shorter = workload.tokens - planner.config.num_image_tokens
    return found - workload.texts * (of_rows(workload.tokens, 0) - of_rows(shorter, 0))


def three_digits(value: float) -> str:
    """A number to show: three digits that count, and no exponent."""
    places = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:,.{max(places, 0)}f}"


def show_step_time(
    config: RunConfig, directory: Path, plan: Plan, workload: StepWorkload, steps: BatchSampler | None
) -> None:
    """How long the run would take, from the phases of a step on its device, in a network of random weights."""
    device = pick_device(config.model.device)
    model = random_model(directory, config, device)
    adapt(model, config, anew=True)
    pad_id, micro_batch = model.config.pad_token_id, plan.execution.micro_batch
    time = time_step(config, model, plan.execution, workload, partial(collate, pad_id=pad_id))
    phases = {
        f"{micro_batch} images": time.encode,
        f"{micro_batch} rows forward and backward": time.decode,
        "an update": time.update,
        "moving the vision encoder": time.move,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    show(f"timed on {name}, in rows of {workload.tokens} tokens, {workload.supervised} of them supervised:")
    if workload.texts:
        show("(rows without an image, which are shorter, are taken to be as long)")
    show(", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in phases.items()))
    if time.peak is not None:
        show(
            f"at most {time.peak / GIB:.2f} GiB were reserved, without the context; planned were "
            f"{plan.total / GIB:.2f} with it"
        )
    seconds = time.seconds(workload, micro_batch)
    show(
        f"a step of {workload.examples} examples with {workload.images:.1f} images: {seconds:.2f} s, "
        f"{time.speed(workload, micro_batch):.3g} TFLOP/s"
    )
    if steps:
        drawn = "the answers that are drawn, " if config.train.objective == "reward" else ""
        show(
            f"{steps.total:,} steps: {steps.total * seconds / 3600:.2f} hours, without {drawn}evaluations, "
            "checkpoints, and waiting for images"
        )


def planned_evaluation(config: RunConfig, planned: RunPlan, new_tokens: int) -> RunConfig:
    """The run, with as many questions at once in its evaluations as fit the budget; shown where they are fewer."""
    asked, budget = config.evaluation.batch_size, planned.plan.budget
    size = planned.planner.evaluation_batch(asked, new_tokens, budget)
    if size < asked and config.evaluates:
        show(
            f"evaluations answer {size} questions at once, not {asked}: those would take "
            f"{planned.planner.evaluation(asked, new_tokens) / GIB:.2f} of {budget / GIB:.2f} GiB"
        )
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": size})})
