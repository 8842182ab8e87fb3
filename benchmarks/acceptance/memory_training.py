"""The memory of a training under the cap of benchmarks/acceptance/memory.py: phase by phase beside the plan, with the
vision encoder in host memory, and where it runs out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import arms
from benchmarks.acceptance.bench import Bench, Example, gradients_of
from benchmarks.acceptance.card import Card, Memory
from benchmarks.acceptance.findings import NO_BOUND, Finding, SkippedError, at_most, judged
from benchmarks.acceptance.memory import CAP
from benchmarks.acceptance.rounding import distance, joined
from benchmarks.acceptance.training import make_trainer
from benchmarks.side_by_side import GIB
from data import collate
from finetune.evaluation.batches import in_batches
from finetune.lora.linear import LoRAConfig
from finetune.lora.protocol import trained_parameters
from finetune.preflight.plan import CONTEXT, Plan, Planner
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.trainer import LoRATrainer
from model import PaliGemma

LIMIT = 0.1  # how far a planned figure may be from the measured one
EXAMPLES, ANSWERS_AT_ONCE, NEW_TOKENS = 16, 16, 16
MANY, MANY_ON_CPU = 64, 12  # questions, for which there is no room at once
STEP = ("images", "forward", "backward", "optimizer")  # phases
SKIPPED_ON_CPU = "a CPU has no memory of its own to measure"


class Meter:
    """The peaks of memory between marks; a phase that comes again keeps its highest."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.phases: dict[str, Memory] = {}
        card.reset_peak()

    def mark(self, phase: str) -> None:
        """What was done since the last mark was `phase`."""
        now = self.card.memory()
        self.phases[phase] = now.highest(self.phases.get(phase, now))
        self.card.reset_peak()


def plan_of(bench: Bench, examples: list[Example]) -> tuple[Planner, Plan]:
    """The plan of training on these examples with what the card of 8 GB has."""
    longest = max(len(example["input_ids"]) for example in examples)
    answer = max(int(example["token_type_ids"].sum()) for example in examples)
    lora = LoRAConfig(rank=arms.RANK, alpha=arms.RANK)
    planner = Planner(bench.config, lora, torch.bfloat16, longest, answer, len(examples), bench.device)
    return planner, planner.choose(int(CAP * GIB) + CONTEXT)


def sole_model(bench: Bench) -> PaliGemma:
    """Our network with adapters, in bf16, the only one to hold its weights, so that they can leave the device."""
    bench.keep_only(torch.bfloat16)
    model = bench.adapted(torch.bfloat16)
    bench.keep_only()
    return model


def phases(bench: Bench) -> Iterator[Finding]:
    """Planned, allocated and reserved by torch, in use by the driver's count: for each phase of two steps."""
    examples = bench.examples(EXAMPLES)
    planner, plan = plan_of(bench, examples)
    bench.keep_only(torch.bfloat16)
    with bench.card.capped(CAP):
        meter = Meter(bench.card)
        meter.mark("load")
        model = bench.adapted(torch.bfloat16)
        bench.keep_only()
        meter.mark("inject")
        trainer = make_trainer(bench, model, examples, plan.execution, bench.scratch())
        meter.mark("trainer")
        measure_steps(trainer, examples, meter)
        at_once = planner.evaluation_batch(ANSWERS_AT_ONCE, NEW_TOKENS, plan.budget)
        with trainer.accumulation.vision_on_device():
            answers(bench, model, examples, at_once)
        meter.mark("evaluation")
    planned = {"load": planner.frozen, "inject": planner.frozen + planner.trained}
    for name, found in meter.phases.items():
        figure = f"allocated {found.allocated:.2f}, reserved {found.reserved:.2f}, driver {found.driver:.2f} GiB"
        details = {"measured": vars(found), "planned": planned.get(name, 0) / GIB}
        yield judged(f"phase.{name}", True, figure, NO_BOUND, **details)
    if not bench.card.is_cuda:
        raise SkippedError(SKIPPED_ON_CPU)
    step = max((meter.phases[name] for name in STEP), key=lambda found: found.reserved)
    yield planned_beside("step", plan.total - CONTEXT, step, components=plan.components, execution=str(plan.execution))
    evaluation = planner.evaluation(at_once, NEW_TOKENS) - CONTEXT
    yield planned_beside("evaluation", evaluation, meter.phases["evaluation"], questions_at_once=at_once)


def planned_beside(name: str, planned: int, found: Memory, **details: Any) -> Finding:
    """Whether a planned number of bytes is within LIMIT of what torch reserved."""
    ratio = found.reserved * GIB / planned
    figure = f"{planned / GIB:.2f} GiB planned, {found.reserved:.2f} reserved"
    return judged(f"plan.{name}", abs(1 - ratio) <= LIMIT, figure, f"within {LIMIT:.0%}", ratio=ratio, **details)


def measure_steps(trainer: LoRATrainer, examples: list[Example], meter: Meter) -> None:
    """Two steps of the trainer, the second of which has its optimizer's state, with a mark at the end of each phase."""
    network, micro_step = trainer.network, trainer.accumulation.micro_step

    def measured(*given: Any) -> Tensor:
        loss = micro_step(*given)
        meter.mark("backward")
        return loss

    hooks = [network.language_model.model.register_forward_pre_hook(lambda *_: meter.mark("images"))]
    hooks.append(network.register_forward_hook(lambda *_: meter.mark("forward")))
    trainer.accumulation.micro_step = measured  # type: ignore[method-assign, assignment]
    optimizer = trainer.create_optimizer()
    for _ in range(2):
        trainer.training_step(network, examples)
        optimizer.step()
        meter.mark("optimizer")
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    trainer.accumulation.micro_step = micro_step  # type: ignore[method-assign]


class Pixels:
    """What of a processor an evaluation asks for its images: here they are pixels already."""

    def pixels(self, image: Tensor) -> Tensor:
        return image


def answers(bench: Bench, model: PaliGemma, examples: Sequence[Example], at_once: int) -> dict[str, Tensor]:
    """New tokens [NEW_TOKENS at most] by the example's id, as an evaluation generates them."""

    def generate(rows: list[Any], features: Tensor | None) -> dict[str, Tensor]:
        texts = collate([{"input_ids": row["input_ids"]} for row in rows], bench.config.pad_token_id)
        ids, mask = (texts[name].to(bench.device) for name in ("input_ids", "attention_mask"))
        new = model.generate(ids, attention_mask=mask, image_features=features, max_new_tokens=NEW_TOKENS)
        return dict(zip((row["id"] for row in rows), new, strict=True))

    processor: Any = Pixels()
    records = [{**example, "image": example["pixel_values"]} for example in examples]
    found: dict[str, Tensor] = {}
    for some in in_batches(model, processor, records, at_once, generate):
        found |= some
    return found


def offload(bench: Bench) -> Iterator[Finding]:
    """What leaves the device when the vision encoder is kept in host memory, and stays away in a step's decoder."""
    model, examples = sole_model(bench), bench.examples(4)
    tower = sum(parameter.nbytes for parameter in model.vision_tower.parameters()) / GIB
    trainer = make_trainer(bench, model, examples, ExecutionPlan(2, offload_vision=True), bench.scratch())
    trainer.training_step(trainer.network, examples)
    gradients_of(trained_parameters(model))
    bench.release()
    before = bench.card.allocated()
    with trainer.accumulation.vision_on_device():
        within = bench.card.allocated()
    if not bench.card.is_cuda:
        raise SkippedError(SKIPPED_ON_CPU)
    figure = f"{within - before:.3f} GiB away, the vision encoder has {tower:.3f}"
    yield judged("offload", abs(within - before - tower) <= LIMIT * tower, figure, f"within {LIMIT:.0%}")


def recovers(bench: Bench) -> Iterator[Finding]:
    """A step that finds no room is repeated in smaller micro-batches, and is the same step."""
    model, examples = sole_model(bench), bench.examples(EXAMPLES)
    trainer = make_trainer(bench, model, examples, ExecutionPlan(EXAMPLES), bench.scratch(), micro_batch="auto")
    with (
        bench.card.capped(CAP),
        bench.card.little_room(model.language_model.model),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        trainer.training_step(trainer.network, examples)
        got = joined(gradients_of(trained_parameters(model)))
        rows = trainer.accumulation.execution_plan.micro_batch
        trainer.training_step(trainer.network, examples)
        again = joined(gradients_of(trained_parameters(model)))
    said = sum("out of memory" in str(warning.message) for warning in caught)
    figure = f"{said} times, from {EXAMPLES} to {rows} rows"
    yield judged("recovers", said >= 1 and rows < EXAMPLES, figure, "at least once", rows=rows)
    yield at_most("recovers.gradient", distance(got, again), 2**-7)


def evaluation_recovers(bench: Bench) -> Iterator[Finding]:
    """A batch of questions that finds no room is repeated in halves, and every question gets its answer."""
    many = MANY if bench.card.is_cuda else MANY_ON_CPU
    model, examples = sole_model(bench), bench.examples(many)
    room = bench.card.little_room(model.language_model.model)
    with bench.card.capped(CAP), room, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = answers(bench, model, examples, many)
    said = sum("out of memory" in str(warning.message) for warning in caught)
    wanted = {example["id"] for example in examples}
    figure = f"{said} times from {many} questions at once; {len(found)} of {len(wanted)} answered"
    yield judged("recovers.evaluation", said >= 1 and found.keys() == wanted, figure, "at least once, all answered")
