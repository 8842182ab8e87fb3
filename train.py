"""YAML -> adapter: one run, described by one file.

python train.py configs/vqav2_8gb.yaml
python train.py configs/vqav2_8gb.yaml train.epochs=2 lora.rank=32
accelerate launch --multi_gpu train.py configs/vqav2_8gb.yaml

Before a long run: --dry-run says whether it fits, with --probe how long it takes here; --check looks at every picture;
--inspect shows what is learned from; --overfit 8 tries whether it learns at all. --help lists every key of the file,
with its meaning.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data import PaliGemmaDataset, Processor, collate
from data.invalid import SkippedRecords
from data.lengths import TextLengths
from data.records import decodable
from finetune import cli, save_adapter
from finetune.adapters.generation_config import store_max_new_tokens
from finetune.adapters.start_from import require_agreement, start
from finetune.adapters.storage import TrainingFacts
from finetune.config.schema import RunConfig, describe, load_config
from finetune.evaluation.evaluate import evaluate, generate_answers, mean_loss
from finetune.lora.linear import adapter_table
from finetune.lora.nf4 import open_base, quantize
from finetune.preflight.inspection import problems_of
from finetune.preflight.plan import GIB, Plan, Planner, assumed, plan_run, require_fit, spill_warning
from finetune.preflight.probe import Shape, learn_by_heart, pictures_of, probe, trial_config
from finetune.system import distributed
from finetune.system.atomic import write_whole
from finetune.system.console import new_table, show
from finetune.system.device import pick_device, pick_dtype
from finetune.system.lock import locked
from finetune.system.paths import argument
from finetune.system.terminal import shortened
from finetune.training.batch_sampler import Steps
from finetune.training.checkpoints import step_of
from finetune.training.examples import Examples, max_new_tokens, open_examples, open_processor, skipped_records, valid
from finetune.training.interrupt import StopOnSignal
from finetune.training.result import Result
from finetune.training.resume import find_checkpoint, start_run
from finetune.training.tracking import callbacks_for
from finetune.training.trainer import LoRATrainer
from model import PaliGemma, PaliGemmaConfig, fetch
from model.random_init import from_random
from model.safetensors_io import refuse_unreadable


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.probe and not arguments.dry_run:
        raise ValueError("--probe times the steps that --dry-run plans: give both")
    looks = arguments.dry_run or arguments.check or arguments.inspect or arguments.overfit is not None
    # A look makes no use of the other processes, and --dry-run none of the device.
    distributed.init(torch.device("cpu") if looks else pick_device(config.model.device))
    if distributed.count() > 1 and looks:
        raise ValueError(
            "--dry-run, --check, --inspect and --overfit look before a run, in one process: leave out the launcher"
        )
    if arguments.dry_run:
        dry_run(config, arguments.probe)
        return
    if arguments.check:
        check(config)
        return
    if arguments.overfit is not None:
        overfit(config, arguments.overfit)
        return
    fetch(config.model.path, config.model.revision, weights=False)  # a wrong name is said before anything else
    if arguments.inspect:
        inspect(config)
        return
    with locked(Path(config.output, "run.lock"), Path(config.output), "training"):
        learn(config, arguments)


def learn(config: RunConfig, arguments: argparse.Namespace) -> None:
    """The run, from its start or from where it was stopped, to its result."""
    found, notes = distributed.on_main(partial(find_checkpoint, config, arguments.resume, arguments.accept_changes))
    checkpoint = Path(found) if found else None
    for note in notes:
        show(note)
    directory = fetch(config.model.path, config.model.revision)
    processor = open_processor(directory, config.data)
    examples = open_examples(config, "train", processor)
    if examples.skipped.reasons:
        skipped = examples.skipped
        show(f"{len(skipped.reasons):,} records cannot be used, others take their places: see {skipped.file}")
    planner, plan, whose = plan_run(config, PaliGemmaConfig.from_directory(directory), examples.longest)
    dataset = PaliGemmaDataset(examples.records, processor, config.data.answers, config.train.seed, examples.skipped)
    require_fit(config, plan, whose)
    asked, new_tokens = asked_in_training(config, processor), max_new_tokens(config, examples.lengths)
    steps = plan_steps(config, len(dataset))
    if checkpoint and step_of(checkpoint) == steps.total and not arguments.accept_changes:
        result = Result.read(Path(config.output))
        if result and result.finished and result_directory(config).exists():
            show(f"{config.output} is finished: nothing is left to train; kept {result}")
            return
    if checkpoint and step_of(checkpoint) > steps.total:
        raise ValueError(
            f"{checkpoint} is beyond the {steps.total:,} steps of this configuration: make the run longer "
            "(train.max_steps, train.epochs), resume an earlier checkpoint (--resume DIR), or choose another output=..."
        )
    model = open_model(directory, config)
    show(f"plan: {plan.mode}; {plan.total / GIB:.2f} of {plan.budget / GIB:.2f} GiB {whose}")
    if warning := spill_warning(model.device):
        show(f"warning: {warning}")
    adapt(model, config, anew=checkpoint is not None)
    show_trained(model)
    distributed.on_main(partial(start_run, config))
    trainer = LoRATrainer(
        config,
        model,
        dataset,
        steps,
        plan.mode,
        collate=partial(collate, pad_id=processor.pad_id),
        save_result=partial(save_result, model, config, examples.lengths),
        evaluate=evaluation_of(
            planned_evaluation(config, planner, plan, new_tokens), model, processor, asked, new_tokens
        ),
        callbacks=[*callbacks_for(config, steps), stop := StopOnSignal()],
    )
    if checkpoint and step_of(checkpoint) == steps.total:
        show(f"{config.output}: all steps are trained, the result is left to be kept")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopping and trainer.state.global_step < steps.total:
        again = cli.command("train.py", arguments.config, *arguments.overrides)
        again = again if distributed.count() == 1 else "the same command"
        raise cli.StoppedError(f"stopped after step {trainer.state.global_step}; to go on: {again}")
    trainer.finish()
    distributed.on_main(partial(Result.finish, Path(config.output)))
    after = cli.command("evaluate.py", arguments.config, *arguments.overrides)
    if config.data.validation is None:
        after = cli.command("predict.py", "--help")
    result = Result.read(Path(config.output))
    if result and result.step < steps.total:  # a last step that was kept has said so just now
        show(f"kept {result}")
    show(f"saved {result_directory(config)}; next: {after}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Keys of the configuration:\n\n" + describe(),
    )
    parser.add_argument("config", metavar="CONFIG.yaml", type=argument, help="the run")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over the file; values are YAML")
    parser.add_argument(
        "--resume",
        type=argument,
        default="auto",
        help="auto (default: go on where the run stopped), none, or a checkpoint",
    )
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on with a run although the configuration leads elsewhere now"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--dry-run", action="store_true", help="say what the run would take and whether it fits, and stop"
    )
    instead.add_argument(
        "--check", action="store_true", help="decode every image, list every record that cannot be used, and stop"
    )
    instead.add_argument(
        "--inspect", action="store_true", help="show the first examples, check them for leaks, and stop"
    )
    instead.add_argument(
        "--overfit", type=int, metavar="N", help="learn the first N examples by heart, say whether that works, and stop"
    )
    parser.add_argument(
        "--probe", action="store_true", help="with --dry-run: time a few steps on this device, with random weights"
    )
    return parser.parse_intermixed_args(argv)


def open_model(directory: Path, config: RunConfig) -> PaliGemma:
    """The network to start from, on its device."""
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    if config.model.weights == "random":
        return from_random(directory, config.train.seed, dtype, device)
    return open_base(directory, dtype, device, config.model.quantize)


def random_model(directory: Path, config: RunConfig, device: torch.device) -> PaliGemma:
    """A network that takes as long as the one to start from, whose weights are not read."""
    dtype = pick_dtype(config.model.dtype, device)
    if config.model.quantize:
        return quantize(from_random(directory, config.train.seed, dtype), device)
    return from_random(directory, config.train.seed, dtype, device)


def check(config: RunConfig) -> None:
    """Every record of training and validation looked at, every image decoded, every text tokenised; nothing is
    written.

    Raises:
        ValueError: more cannot be used than the configuration lets be skipped; all of them are listed in any case.
    """
    processor = open_processor(fetch(config.model.path, config.model.revision, weights=False), config.data)
    refused = []
    for part in ("train", "validation") if config.data.validation else ("train",):
        skipped, total, usable = SkippedRecords(share=math.inf), 0, 0
        try:
            examples = open_examples(config, part, processor, skipped)
            records, longest = examples.records, examples.longest
            total, usable = len(records), len(valid(decodable(records, skipped), skipped))
            show(f"data.{part}: the longest text has {longest.text:,} tokens, the longest answer {longest.answer:,}")
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
    if refused:
        raise ValueError("\n".join(refused))


def inspect(config: RunConfig) -> None:
    """The first examples as the network sees them, checked for what would ruin the training. Nothing is written."""
    directory = fetch(config.model.path, config.model.revision)
    processor = open_processor(directory, config.data)
    examples = open_examples(config, "train", processor, skipped_records(config, "train", listed=False))
    dataset = PaliGemmaDataset(examples.records, processor, config.data.answers, config.train.seed, examples.skipped)
    model = open_model(directory, config)
    first = [dataset[index] for index in range(min(8, len(dataset)))]
    table = new_table("id", "prefix", "learns to answer", "tokens", "supervised")
    for index, example in enumerate(first):
        answer = example["input_ids"][example["token_type_ids"] == 1]
        prefix = processor.prompt(dataset.records[index]["prefix"])
        texts = map(shortened, (prefix, processor.decode(answer)))
        table.add_row(example["id"], *texts, str(len(example["input_ids"])), str(len(answer)))
    show(table)
    batch = {name: tensor.to(model.device) for name, tensor in collate(first, processor.pad_id).items()}
    if problems := problems_of(model, batch):
        raise ValueError("these examples would ruin the training:\n  " + "\n  ".join(problems))
    show("in order: image tokens, <bos>, prefix, newline, answer, <eos>; and no answer leaks into what comes before it")


def overfit(config: RunConfig, count: int) -> None:
    """Whether learning works at all: the first examples, learned by heart. Nothing is written.

    Raises:
        ValueError: it does not; says what to look at.
    """
    config = trial_config(config, count)
    directory = fetch(config.model.path, config.model.revision)
    processor = open_processor(directory, config.data)
    examples = open_examples(config, "train", processor)
    records = examples.valid
    if not 0 < count <= len(records):
        raise ValueError(f"--overfit {count}: expected 1 to {len(records):,}, the examples of data.train")
    _, plan, _ = plan_run(config, PaliGemmaConfig.from_directory(directory), examples.longest)
    model = open_model(directory, config)
    records = records.select(range(count))
    dataset = PaliGemmaDataset(records, processor, config.data.answers, skipped=examples.skipped)
    adapt(model, config)
    show_trained(model)
    wanted = [
        example["input_ids"][example["token_type_ids"] == 1] for example in map(dataset.__getitem__, range(count))
    ]

    def ask() -> list[tuple[str, str, str]]:
        answers = generate_answers(model, processor, records, max(map(len, wanted)), config.evaluation.batch_size)
        texts = (processor.decode(ids) for ids in wanted)
        return list(zip(records["question"], texts, (answer.text for answer in answers.values()), strict=True))

    trial = learn_by_heart(config, model, dataset, plan.mode, partial(collate, pad_id=processor.pad_id), ask)
    table = new_table("question", "wanted", "answered")
    for row in trial.rows:
        table.add_row(*row)
    show(table)
    found = (
        f"{trial.right} of {count} answered as wanted after {len(trial.losses)} steps, loss {trial.losses[0]:.3f} -> "
        f"{trial.losses[-1]:.3f}"
    )
    if not trial.learned:
        raise ValueError(
            f"it has not learned them: {found}. Look at train.learning_rate ({config.train.learning_rate}), at "
            "lora.targets (what is trained is listed above), and with --inspect at the examples"
        )
    show(f"it learns: {found}")


def plan_steps(config: RunConfig, examples: int) -> Steps:
    train = config.train
    if train.max_steps:
        return Steps(examples, train.batch_size, train.seed, train.max_steps)
    assert train.epochs is not None, "the configuration has epochs or max_steps"
    return Steps.for_epochs(examples, train.batch_size, train.seed, train.epochs)


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


def shape_of(config: RunConfig, planner: Planner, examples: Examples | None) -> tuple[Steps | None, Shape]:
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


def show_pace(config: RunConfig, directory: Path, plan: Plan, shape: Shape, steps: Steps | None) -> None:
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


def table_of_adapters(model: PaliGemma) -> Table:
    table = new_table("tower", "module", "adapted", "rank", "parameters", title="what is trained")
    for scope, name, count, rank, parameters in adapter_table(model):
        table.add_row(scope, name, str(count), str(rank) if rank else "in full", f"{parameters:,}")
    return table


def adapt(model: PaliGemma, config: RunConfig, anew: bool = False) -> None:
    """Put the adapters in, or free all parameters. `anew`: not with the values of lora.start_from."""
    if config.lora is None:
        model.requires_grad_(True)
    else:
        start(model, dataclasses.replace(config.lora, start_from=None) if anew else config.lora, config.train.seed)


def show_trained(model: PaliGemma) -> None:
    """What will be trained."""
    table = table_of_adapters(model)
    if table.row_count:
        show(table)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # A byte of an NF4 weight holds two of its values.
    everything = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    show(f"{trained:,} of {everything:,} parameters are trained, on {model.device} in {model.dtype}")


def asked_in_training(config: RunConfig, processor: Processor) -> Any:
    """A fixed selection of the valid validation questions, whose pictures were decoded; None where the run has none."""
    if config.data.validation is None or config.train.eval_every is None:
        return None
    examples = open_examples(config, "validation", processor)
    records, skipped = examples.valid, examples.skipped
    if config.evaluation.count is not None and config.evaluation.count < len(records):
        records = records.shuffle(seed=config.train.seed).select(range(config.evaluation.count))
    return decodable(records, skipped)


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


def evaluation_of(config: RunConfig, model: PaliGemma, processor: Processor, records: Any, new_tokens: int) -> Any:
    """What measures the model during training: loss and accuracy on these records; None without them.

    new_tokens: the most that an answer may have.
    """
    if records is None:
        return None
    rows = config.evaluation.batch_size

    def measure() -> dict[str, float]:
        evaluated = evaluate(model, processor, records, new_tokens, batch_size=rows)
        by_type = {f"accuracy_{name}": value for name, value in evaluated.score.by_answer_type.items()}
        loss = mean_loss(model, processor, records, rows)
        return {"loss": loss, "accuracy": evaluated.score.overall, **by_type, "unfinished": evaluated.unfinished}

    return measure


def result_directory(config: RunConfig) -> Path:
    return Path(config.output) / ("adapter" if config.lora else "model")


def facts_of(config: RunConfig, lengths: TextLengths, result: Result) -> TrainingFacts:
    """How the run trains, as far as the use of its result depends on it."""
    prompt = config.data.prompt if config.data.train.questions else None  # lines have prompts of their own
    return dataclasses.replace(
        result.facts, prompt=prompt, max_new_tokens=lengths.longest_answer, max_text_tokens=lengths.longest_text
    )


def save_result(model: PaliGemma, config: RunConfig, lengths: TextLengths, result: Result) -> None:
    """The result of the run: an adapter, or the whole checkpoint where all of it was trained; and why this one."""
    directory, facts = result_directory(config), facts_of(config, lengths, result)

    def fill(path: Path) -> None:
        model.save_pretrained(path)
        store_max_new_tokens(path, facts.max_new_tokens)

    with result.written(Path(config.output)):
        if config.lora:
            save_adapter(model, directory, config.model.path, config.model.revision, facts)
        else:
            write_whole(directory, fill, sum(parameter.nbytes for parameter in model.parameters()), replace=True)
    show(f"kept {result}")


if __name__ == "__main__":
    cli.run(main)
