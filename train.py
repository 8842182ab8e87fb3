"""YAML -> adapter: one run, described by one file.

python train.py configs/vqav2_8gb.yaml
python train.py configs/vqav2_8gb.yaml train.epochs=2 lora.rank=32
python train.py --keys            every key of the file, with its meaning
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import print as show
from rich.table import Table

from data import PaliGemmaDataset, Processor, collate
from data.records import load_records
from finetune import cli, inject_lora, save_adapter
from finetune.config import RunConfig, describe, load_config
from finetune.device import pick_device, pick_dtype
from finetune.evaluate import evaluate, mean_loss
from finetune.inspection import problems_of
from finetune.lora import adapter_table
from finetune.plan import GIB, plan_run, spill_warning
from finetune.quantize import open_base
from finetune.resume import find_checkpoint, start_run
from finetune.scratch import from_random
from finetune.steps import Steps
from finetune.tracking import callbacks_for
from finetune.trainer import LoRATrainer
from model import PaliGemma, PaliGemmaConfig, fetch


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        dry_run(config)
        return
    checkpoint = find_checkpoint(config, arguments.resume)
    directory = fetch(config.model.path, config.model.revision)
    _, plan, whose = plan_run(config, PaliGemmaConfig.from_directory(directory))
    model = open_model(directory, config)
    processor = Processor.from_pretrained(directory, config.data.max_text_tokens)
    records = load_records(**config.data.train.model_dump(), prompt=config.data.prompt, seed=config.train.seed)
    dataset = PaliGemmaDataset(records, processor, answers=config.data.answers, seed=config.train.seed)
    if arguments.inspect:
        inspect(model, dataset, processor)
        return
    steps = plan_steps(config, len(dataset))
    show(f"plan: {plan.mode}; {plan.total / GIB:.2f} of {plan.budget / GIB:.2f} GiB {whose}")
    adapt(model, config)
    start_run(config)
    trainer = LoRATrainer(
        config,
        model,
        dataset,
        steps,
        plan.mode,
        collate=partial(collate, pad_id=processor.pad_id),
        save_result=partial(save_result, model, config),
        evaluate=evaluation_of(config, model, processor),
        callbacks=callbacks_for(config, steps),
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.finish()
    command = " ".join(["python evaluate.py", arguments.config, *arguments.overrides])
    print(f"saved {result_directory(config)}; next: {command}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Keys of the configuration:\n\n" + describe(),
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over the file; values are YAML")
    parser.add_argument(
        "--resume", default="auto", help="auto (default: go on where the run stopped), none, or a checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run would take and whether it fits, and stop"
    )
    parser.add_argument(
        "--inspect", action="store_true", help="show the first examples, check them for leaks, and stop"
    )
    return parser.parse_intermixed_args(argv)


def open_model(directory: Path, config: RunConfig) -> PaliGemma:
    """The network to start from, on its device."""
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    if config.model.weights == "random":
        return from_random(directory, config.train.seed, dtype, device)
    return open_base(directory, dtype, device, config.model.quantize)


def inspect(model: PaliGemma, dataset: PaliGemmaDataset, processor: Processor) -> None:
    """The first examples as the network sees them, checked for what would ruin the training."""
    examples = [dataset[index] for index in range(min(8, len(dataset)))]
    table = Table("id", "prefix", "learns to answer", "tokens", "supervised")
    for index, example in enumerate(examples):
        answer = example["input_ids"][example["token_type_ids"] == 1]
        prefix = dataset.records[index]["prefix"]
        table.add_row(example["id"], prefix, processor.decode(answer), str(len(example["input_ids"])), str(len(answer)))
    show(table)
    batch = {name: tensor.to(model.device) for name, tensor in collate(examples, processor.pad_id).items()}
    if problems := problems_of(model, batch):
        raise ValueError("these examples would ruin the training:\n  " + "\n  ".join(problems))
    show("in order: image tokens, <bos>, prefix, newline, answer, <eos>; and no answer leaks into what comes before it")


def plan_steps(config: RunConfig, examples: int) -> Steps:
    train = config.train
    if train.max_steps:
        return Steps(examples, train.batch_size, train.seed, train.max_steps)
    assert train.epochs is not None, "the configuration has epochs or max_steps"
    return Steps.for_epochs(examples, train.batch_size, train.seed, train.epochs)


def dry_run(config: RunConfig) -> None:
    """What the run would take, from the configuration and config.json alone; weights and pictures are not opened.

    Raises:
        ValueError: it does not fit; says what to change.
    """
    directory = fetch(config.model.path, config.model.revision, weights=False)
    planner, plan, whose = plan_run(config, PaliGemmaConfig.from_directory(directory))
    show(table_of_adapters(planner.model))
    table = Table("component", "GiB", title="memory on the device")
    for name, size in plan.components.items():
        table.add_row(name, f"{size / GIB:.3f}")
    table.add_row("total", f"{plan.total / GIB:.3f}")
    table.add_row(f"budget: {whose}", f"{plan.budget / GIB:.3f}")
    show(table)
    show(f"rows of {planner.tokens} tokens, {planner.supervised} of them supervised; {plan.mode}")
    try:
        records = load_records(**config.data.train.model_dump(), prompt=config.data.prompt, seed=config.train.seed)
        steps = plan_steps(config, len(records))
        examples = steps.total * steps.batch_size
        show(f"{len(records):,} examples, {steps.total:,} steps, up to {examples * planner.tokens:,} tokens")
    except ValueError as error:
        show(f"steps are not known, for the data cannot be read: {error}")
    if warning := spill_warning(planner.device):
        show(f"warning: {warning}")
    if not plan.fits:
        raise ValueError(
            f"this does not fit: {plan.total / GIB:.2f} GiB are needed at least, the budget is "
            f"{plan.budget / GIB:.2f} ({whose}). Close what else uses the device, lower data.max_text_tokens or "
            "lora.rank, leave train.micro_batch and train.recompute at auto, or take a smaller checkpoint"
        )
    show("it fits")


def table_of_adapters(model: PaliGemma) -> Table:
    table = Table("tower", "module", "adapted", "rank", "parameters", title="what is trained")
    for scope, name, count, rank, parameters in adapter_table(model):
        table.add_row(scope, name, str(count), str(rank) if rank else "in full", f"{parameters:,}")
    return table


def adapt(model: PaliGemma, config: RunConfig) -> None:
    """Put the adapters in, or free all parameters, and show what will be trained."""
    if config.lora is None:
        model.requires_grad_(True)
    else:
        inject_lora(model, config.lora, config.train.seed)
        show(table_of_adapters(model))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    show(f"{trained:,} of {everything:,} parameters are trained, on {model.device} in {model.dtype}")


def evaluation_of(config: RunConfig, model: PaliGemma, processor: Processor) -> Any:
    """What measures the model during training: loss and accuracy on a fixed part of the validation questions."""
    if config.data.validation is None or config.train.eval_every is None:
        return None
    source = config.data.validation.model_dump()
    records = load_records(**source, prompt=config.data.prompt, seed=config.train.seed)
    if config.evaluation.count is not None and config.evaluation.count < len(records):
        records = records.shuffle(seed=config.train.seed).select(range(config.evaluation.count))
    settings = config.evaluation

    def measure() -> dict[str, float]:
        scored = evaluate(model, processor, records, **settings.model_dump(exclude={"count"})).score
        by_type = {f"accuracy_{name}": value for name, value in scored.by_answer_type.items()}
        loss = mean_loss(model, processor, records, settings.batch_size)
        return {"loss": loss, "accuracy": scored.overall, **by_type}

    return measure


def result_directory(config: RunConfig) -> Path:
    return Path(config.output) / ("adapter" if config.lora else "model")


def save_result(model: PaliGemma, config: RunConfig) -> None:
    """The result of the run: an adapter, or the whole checkpoint where all of it was trained."""
    if config.lora:
        save_adapter(model, result_directory(config), base=config.model.path, revision=config.model.revision)
    else:
        model.save_pretrained(result_directory(config))


if __name__ == "__main__":
    cli.run(main)
