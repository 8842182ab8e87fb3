"""`train.py --dry-run`: what a run would take, and whether it fits, before anything is loaded."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch

from data import collate
from finetune.adapters.start_from import require_agreement
from finetune.config.schema import RunConfig
from finetune.preflight.plan import GIB, Plan, Planner, assumed, plan_run, require_fit, spill_warning
from finetune.preflight.probe import Shape, pictures_of, probe
from finetune.system.console import new_table, show
from finetune.system.device import pick_device
from finetune.training.batch_sampler import BatchSampler
from finetune.training.examples import Examples, max_new_tokens, open_examples, open_processor
from finetune.training.setup import adapt, plan_steps, random_model, table_of_adapters
from model import PaliGemma, PaliGemmaConfig, fetch
from model.safetensors_io import refuse_unreadable


def dry_run(config: RunConfig, probed: bool) -> None:
    """What the run would take, from the configuration and config.json alone; of weights only headers are read.

    probed: say how long, too.

    Raises:
        ValueError: it does not fit; says what to change.
    """
    directory = fetch(config.model.path, config.model.revision, weights=False)
    dimensions = PaliGemmaConfig.from_directory(directory)
    if config.model.weights == "pretrained":
        refuse_unreadable(directory)
    resumes = any(Path(config.output, "checkpoints").glob("step-*"))  # and has no use for lora.start_from
    if config.lora and config.lora.start_from and not resumes:
        with torch.device("meta"):
            require_agreement(PaliGemma(dimensions), config.lora)
    examples = readable_examples(config, directory)
    longest = examples.longest if examples else assumed(config.data)
    planner, plan, whose = plan_run(config, dimensions, longest)
    show(table_of_adapters(planner.model))
    table = new_table("component", "GiB", title=f"memory on {planner.device}")
    for name, size in plan.components.items():
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_row("total", f"{plan.total / GIB:.3f}")
    table.add_row(f"budget: {whose}", f"{plan.budget / GIB:.3f}")
    show(table)
    known = "the longest of the data" if examples else "assumed, for the data cannot be read"
    show(f"rows of {planner.tokens} tokens, answers of {planner.supervised} ({known}); {plan.mode}")
    steps, shape = shape_of(config, planner, examples)
    work = planner.mean_work(plan.mode, shape.tokens, shape.supervised, shape.pictures / shape.examples)
    of_run = f", {three_digits(work * shape.examples * steps.total)} for the run" if steps else ""
    show(
        f"{three_digits(work)} TFLOP an example in rows of {shape.tokens} tokens, answers of {shape.supervised}{of_run}"
    )
    if config.data.validation is not None:
        planned_evaluation(
            config, planner, plan, max_new_tokens(config, examples.lengths) if examples else planner.supervised
        )
    if warning := spill_warning(planner.device):
        show(f"warning: {warning}")
    require_fit(config, plan, whose)
    show("it fits")
    if probed:
        show_pace(config, directory, plan, shape, steps)


def readable_examples(config: RunConfig, directory: Path) -> Examples | None:
    """The examples of the run, or None with a line that says why they cannot be read."""
    try:
        return open_examples(config, "train", open_processor(directory, config.data))
    except ValueError as error:
        show(f"steps and lengths are not known, for the data cannot be read: {error}")
        return None


def shape_of(config: RunConfig, planner: Planner, examples: Examples | None) -> tuple[BatchSampler | None, Shape]:
    """The steps, as far as the data can be read, and what each is made of, by rows of mean length."""
    size = config.train.batch_size
    if examples is None:
        return None, Shape(size, size, planner.tokens, planner.supervised)
    records, lengths = examples.records, examples.lengths
    steps = plan_steps(config, len(records))
    pictures = pictures_of(steps, records["image_id"][:])
    show(f"{len(records):,} examples, {steps.total:,} steps, up to {steps.total * size * planner.tokens:,} tokens")
    if size > len(records):
        show(
            f"warning: a step of train.batch_size={size} is more than the {len(records):,} examples of data.train: it "
            "takes some of them more than once; a smaller train.batch_size makes more steps of an epoch"
        )
    tokens = planner.config.vision.num_patches + 1 + math.ceil(lengths.mean_text)
    return steps, Shape(size, pictures, tokens, math.ceil(lengths.mean_answer))


def three_digits(value: float) -> str:
    """A number to show: three digits that count, and no exponent."""
    places = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:,.{max(places, 0)}f}"


def show_pace(config: RunConfig, directory: Path, plan: Plan, shape: Shape, steps: BatchSampler | None) -> None:
    """How long the run would take, from parts of a step on its device, in a network of random weights."""
    device = pick_device(config.model.device)
    model = random_model(directory, config, device)
    adapt(model, config, anew=True)
    pad_id, micro_batch = model.config.pad_token_id, plan.mode.micro_batch
    pace = probe(config, model, plan.mode, shape, partial(collate, pad_id=pad_id))
    parts = {
        f"{micro_batch} images": pace.pictures,
        f"{micro_batch} rows forward and backward": pace.rows,
        "an update": pace.update,
        "moving the vision tower": pace.move,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    show(f"timed on {name}, in rows of {shape.tokens} tokens, {shape.supervised} of them supervised:")
    show(", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()))
    if pace.peak is not None:
        show(f"at most {pace.peak / GIB:.2f} GiB were reserved, the context aside; planned were {plan.total / GIB:.2f}")
    seconds = pace.seconds(shape, micro_batch)
    show(
        f"a step of {shape.examples} examples with {shape.pictures:.1f} images: {seconds:.2f} s, "
        f"{pace.speed(shape, micro_batch):.3g} TFLOP/s"
    )
    if steps:
        show(
            f"{steps.total:,} steps: {steps.total * seconds / 3600:.2f} hours, without evaluations, checkpoints, and "
            "waiting for images"
        )


def planned_evaluation(config: RunConfig, planner: Planner, plan: Plan, new_tokens: int) -> RunConfig:
    """The run, with as many questions at once in its evaluations as fit the budget; said where they are fewer."""
    asked = config.evaluation.batch_size
    size = planner.evaluation_batch(asked, new_tokens, plan.budget)
    if size < asked and config.data.validation is not None and config.train.eval_every is not None:
        show(
            f"evaluations answer {size} questions at once, not {asked}: those would take "
            f"{planner.evaluation(asked, new_tokens) / GIB:.2f} of {plan.budget / GIB:.2f} GiB"
        )
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": size})})
