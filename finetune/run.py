"""A training run, from its configuration to its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data import PaliGemmaDataset, collate
from data.lengths import TextLengths
from finetune import cli, save_adapter
from finetune.adapters.fingerprint import fingerprint
from finetune.adapters.generation_config import store_max_new_tokens
from finetune.adapters.metadata import TrainingFacts
from finetune.config.schema import RunConfig
from finetune.config.stages import runs_of
from finetune.evaluation.in_training import asked_in_training, evaluation_of
from finetune.evaluation.run import task_of, worth_of
from finetune.preflight.dry_run import planned_evaluation
from finetune.preflight.plan import GIB
from finetune.preflight.run_plan import RunPlan, plan_run, require_fit, spill_warning
from finetune.report.model_card import show_card
from finetune.report.page import show_page
from finetune.system import distributed
from finetune.system.atomic import write_whole
from finetune.system.console import show
from finetune.system.device import free_memory, pick_device
from finetune.training.checkpoints import step_of
from finetune.training.commits import at_commits
from finetune.training.examples import (
    max_new_tokens,
    network_config,
    open_examples,
    open_processor,
    require_paths,
    shared_images_note,
)
from finetune.training.interrupt import StopOnSignal
from finetune.training.objective_of_run import objective_of, prepare, require_built
from finetune.training.reference import has_values
from finetune.training.result import Result
from finetune.training.resume import find_checkpoint, is_complete, start_run
from finetune.training.setup import (
    adapt,
    image_note,
    open_model,
    plan_steps,
    require_starts,
    shard_decoder,
    shortness_note,
    show_trained,
    start_note,
)
from finetune.training.tracking import Samples, callbacks_for
from finetune.training.trainer import LoRATrainer
from model import PaliGemma, fetch


def learn(config: RunConfig, words: Sequence[str], resume: str = "auto", accept_changes: bool = False) -> None:
    """The run, its stages first, from its start or from where it was stopped, to its result.

    words: of the command line, to show how to resume. resume, accept_changes: as in `find_checkpoint`; a checkpoint is
    one of the run itself, before which all stages are finished.

    Raises:
        ValueError: a path of the examples does not exist, answers cannot be judged, the network cannot be made of the
            checkpoint, or as `find_checkpoint` of the run and of each stage: before weights are read, and before any
            stage is trained.
    """
    require_built(config)
    require_paths(config, "train", "validation")
    if config.data.validation:
        task_of(config).require()
    worth_of(config)
    config = at_commits(config)
    network_config(fetch(config.model.path, config.model.revision, weights=False), config)
    *stages, run = runs_of(config)
    find = partial(find_checkpoint, resume=resume, accept_changes=accept_changes)
    begun, notes = distributed.on_main(partial(find, run))
    left = {} if begun else distributed.on_main(partial(stages_left, stages, resume, accept_changes))
    for stage in stages if not begun else ():
        name = Path(stage.output).name
        if stage.output in left:
            show(f"stage {name}: the connector alone, in {stage.output}")
            found, of_stage = left[stage.output]
            after = "what comes next starts with this connector"
            if learn_one(stage, words, found, of_stage, accept_changes, after):
                raise cli.StoppedError(f"stopped after stage {name}; to resume: {resuming(words)}")
            free_memory(pick_device(stage.model.device))  # its network is gone before the next one is opened
        else:
            show(f"stage {name} is finished: kept {Result.read(Path(stage.output))}")
    validates = config.data.validation is not None
    after = cli.command("evaluate.py", *words) if validates else cli.command("predict.py", "--help")
    learn_one(run, words, begun, notes, accept_changes, f"next: {after}")


def stages_left(
    stages: Sequence[RunConfig], resume: str, accept_changes: bool
) -> dict[str, tuple[Path | None, list[str]]]:
    """What `find_checkpoint` says of the stages that have yet to be trained, by their directories. ValueError where one
    of them cannot be.
    """
    left = [stage for stage in stages if resume == "none" or not is_complete(stage)]
    return {stage.output: find_checkpoint(stage, resume, accept_changes) for stage in left}


def learn_one(
    config: RunConfig,
    words: Sequence[str],
    found: str | Path | None,
    notes: Sequence[str],
    accept_changes: bool,
    after: str,
) -> bool:
    """A stage, or the run itself; returns whether a signal that came during its last step asks to stop.

    found, notes: as `find_checkpoint` returns them. after: shown at the end.
    """
    checkpoint = Path(found) if found else None
    show(*notes)
    directory = fetch(config.model.path, config.model.revision)
    if checkpoint is None or has_values(config):
        require_starts(directory, config)
    processor = open_processor(directory, config)
    examples = open_examples(config, "train", processor)
    if reasons := examples.skipped.reasons:
        show(f"{len(reasons):,} records cannot be used, others take their places: see {examples.skipped.file}")
    planned = plan_run(config, network_config(directory, config), examples.longest)
    dataset = PaliGemmaDataset(examples.records, processor, config.learned_answers, config.train.seed, examples.skipped)
    require_fit(config, planned)
    asked, new_tokens = asked_in_training(config, processor), max_new_tokens(config, examples.lengths)
    batch_sampler = plan_steps(config, examples.sizes)
    if checkpoint and is_finished(config, checkpoint, batch_sampler.total, accept_changes):
        show(f"{config.output} is finished: nothing is left to train; kept {Result.read(Path(config.output))}")
        return False
    worth = worth_of(config, examples.valid.remove_columns("image"))
    shared = shared_images_note(examples.records, asked) if asked else None
    show(*(f"warning: {note}" for note in (shared, shortness_note(batch_sampler)) if note))
    model, base_fingerprint = open_adapted(directory, config, resumes=checkpoint is not None)
    objective = objective_of(config, model, processor, examples, asked, worth)
    show_start(config, model, planned, checkpoint, batch_sampler.total)
    distributed.on_main(partial(start_run, config))
    distributed.on_main(partial(Result.reopen, Path(config.output)))
    evaluated, samples, metric = planned_evaluation(config, planned, new_tokens), Samples(), task_of(config).key
    trainer = LoRATrainer(
        config,
        model,
        dataset,
        batch_sampler,
        planned.plan.execution,
        collate=partial(collate, pad_id=processor.pad_id),
        save_result=partial(save_result, model, config, examples.lengths, base_fingerprint),
        evaluate=evaluation_of(evaluated, model, processor, asked, new_tokens, samples),
        metric=metric,
        callbacks=[*callbacks_for(config, batch_sampler, samples, metric), stop := StopOnSignal()],
        objective=objective,
    )
    prepare(trainer, batch_sampler, config.data.workers)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    ended = trainer.state.global_step == batch_sampler.total or trainer.is_past_its_best
    if stop.stopping and not ended:
        raise cli.StoppedError(f"stopped after step {trainer.state.global_step}; to resume: {resuming(words)}")
    trainer.finish()
    conclude(config, trainer.state.global_step, batch_sampler.total, after)
    distributed.on_main(partial(show_page, Path(config.output)))
    return distributed.total(stop.received is not None) > 0


def show_start(config: RunConfig, model: PaliGemma, planned: RunPlan, checkpoint: Path | None, total: int) -> None:
    """What begins, or resumes from a checkpoint: the plan, what is trained, what the decoder sees of an image, and what
    to know of its connector. total: steps of the whole run.
    """
    plan = planned.plan
    show(f"plan: {plan.execution}; {plan.total / GIB:.2f} of {plan.budget / GIB:.2f} GiB {planned.budget_source}")
    show_trained(model)
    show(image_note(model.config))
    if checkpoint is None and (advice := start_note(config)):
        show(advice)
    if checkpoint and step_of(checkpoint) == total:
        show(f"{config.output}: all steps are trained, the result is left to be kept")


def resuming(words: Sequence[str]) -> str:
    """The command that resumes a run, to show."""
    return cli.command("train.py", *words) if distributed.count() == 1 else "the same command"


def is_finished(config: RunConfig, checkpoint: Path, total: int, accept_changes: bool) -> bool:
    """Whether a run of `total` steps, whose newest checkpoint this is, has its result and nothing left to do.

    Raises:
        ValueError: the checkpoint has seen more steps; or changes are accepted, which no step is left to make.
    """
    if step_of(checkpoint) > total:
        raise ValueError(
            f"{checkpoint} is beyond the {total:,} steps of this configuration: make the run longer (train.max_steps, "
            "train.epochs), resume an earlier checkpoint (--resume DIR), or choose another output=..."
        )
    result = Result.read(Path(config.output))
    ended = result is not None and result.finished and result_directory(config).exists()
    if result and ended and result.stopped_at == step_of(checkpoint):
        return not accept_changes  # of patience, or of anything else: then it goes on
    if ended and accept_changes and step_of(checkpoint) == total:
        raise ValueError(
            f"{config.output} is finished: a change of its configuration would change nothing in it. Make the run "
            "longer (train.max_steps, train.epochs), or choose another output=..."
        )
    return step_of(checkpoint) == total and ended


def open_adapted(directory: Path, config: RunConfig, resumes: bool) -> tuple[PaliGemma, str | None]:
    """The network on its device, with adapters in place; and the fingerprint of its base where its layers are sharded,
    for it is taken of whole weights.

    resumes: adapters are filled from a checkpoint later, not with the values that the run starts from, unless those are
    what it is compared with.
    """
    model, base_fingerprint = open_model(directory, config), None
    adapt(model, config, anew=resumes and not has_values(config))
    if distributed.asks_for_fsdp():
        base_fingerprint = fingerprint(model)
        shard_decoder(model, config)
        show(f"each of the {distributed.count()} processes holds a shard of every decoder layer")
    if warning := spill_warning(model.device):
        show(f"warning: {warning}")
    return model, base_fingerprint


def conclude(config: RunConfig, step: int, total: int, after: str) -> None:
    """Note that a run went to its end, or stopped early after `step` of `total`, and show its result and what to do
    next.
    """
    distributed.on_main(partial(Result.finish, Path(config.output), step if step < total else None))
    result = Result.read(Path(config.output))
    if step < total:
        evaluations = "evaluation" if config.train.patience == 1 else f"{config.train.patience} evaluations"
        show(f"stopped early, after step {step:,} of {total:,}: the last {evaluations} brought no better result")
    if result and result.step < step:  # a last step that was kept has said so just now
        show(f"kept {result}")
    show(f"saved {result_directory(config)}; {after}")


def result_directory(config: RunConfig) -> Path:
    return Path(config.output) / ("adapter" if config.lora else "model")


def facts_of(config: RunConfig, lengths: TextLengths, result: Result) -> TrainingFacts:
    """How the run trains, as far as the use of its result depends on it."""
    return dataclasses.replace(
        result.facts,
        prompt=config.data.prompt_of_all,
        max_new_tokens=lengths.longest_answer,
        max_text_tokens=lengths.longest_text,
    )


def save_result(
    model: PaliGemma, config: RunConfig, lengths: TextLengths, base_fingerprint: str | None, result: Result
) -> None:
    """The result of the run: an adapter, or the whole checkpoint where all of it was trained; and why this one.

    base_fingerprint: of the base, where the model no longer has its weights whole.
    """
    directory, facts = result_directory(config), facts_of(config, lengths, result)

    def fill(path: Path) -> None:
        model.save_pretrained(path)
        store_max_new_tokens(path, facts.max_new_tokens)

    with result.written(Path(config.output)):
        if config.lora:
            save_adapter(model, directory, config.model.path, config.model.revision, facts, base_fingerprint)
        else:
            write_whole(directory, fill, sum(parameter.nbytes for parameter in model.parameters()), replace=True)
    show_card(directory)
    show(f"kept {result}")
