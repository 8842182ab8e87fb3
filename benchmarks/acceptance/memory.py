"""Whether what the plan promises fits: under a cap that leaves what a card with 8 GB leaves beside its context.

On a CPU memory is the process's, nothing is capped, and the end of memory is played: the code runs, and what it would
settle is skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import arms, side_by_side
from benchmarks.acceptance.bench import Bench, Example, gradients_of
from benchmarks.acceptance.card import Card, Memory
from benchmarks.acceptance.findings import Finding, Part, SkippedError, at_most, judged
from benchmarks.acceptance.rounding import distance, joined
from benchmarks.acceptance.training import make_trainer
from benchmarks.side_by_side import GIB
from benchmarks.train_step import find_largest
from finetune.device import is_out_of_memory
from finetune.lora import LoRAConfig
from finetune.plan import CONTEXT, Mode, Plan, Planner
from finetune.protocol import trained_parameters
from finetune.trainer import LoRATrainer
from model import PaliGemma

CAP = 6.95  # GiB for torch's allocator: 8 GB less a display's share and the context
LIMIT = 0.1  # how far a planned figure may be from the measured one
EXAMPLES, ANSWERS_AT_ONCE, NEW_TOKENS = 16, 16, 16
STEP = ("images", "forward", "backward", "optimizer")  # phases
NO_BOUND = "no bound"
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
        trainer = make_trainer(bench, model, examples, plan.mode, bench.scratch())
        meter.mark("trainer")
        measure_steps(trainer, examples, meter)
        answer(bench, model, trainer)
        meter.mark("evaluation")
    planned = {"load": planner.frozen, "inject": planner.frozen + planner.trained}
    for name, found in meter.phases.items():
        figure = f"allocated {found.allocated:.2f}, reserved {found.reserved:.2f}, driver {found.driver:.2f} GiB"
        details = {"measured": vars(found), "planned": planned.get(name, 0) / GIB}
        yield judged(f"phase.{name}", True, figure, NO_BOUND, **details)
    if not bench.card.is_cuda:
        raise SkippedError(SKIPPED_ON_CPU)
    step = max((meter.phases[name] for name in STEP), key=lambda found: found.reserved)
    yield planned_beside("step", plan.total - CONTEXT, step, components=plan.components, mode=str(plan.mode))


def planned_beside(name: str, planned: int, found: Memory, **details: Any) -> Finding:
    """Whether a planned number of bytes is within LIMIT of what torch reserved."""
    ratio = found.reserved * GIB / planned
    figure = f"{planned / GIB:.2f} GiB planned, {found.reserved:.2f} reserved"
    return judged(f"plan.{name}", abs(1 - ratio) <= LIMIT, figure, f"within {LIMIT:.0%}", ratio=ratio, **details)


def measure_steps(trainer: LoRATrainer, examples: list[Example], meter: Meter) -> None:
    """Two steps of the trainer, the second of which has its optimizer's state, with a mark at the end of each phase."""
    network, backward = trainer.network, trainer.accelerator.backward

    def measured_backward(loss: Tensor) -> None:
        meter.mark("forward")
        backward(loss)
        meter.mark("backward")

    hook = network.language_model.model.register_forward_pre_hook(lambda *_: meter.mark("images"))
    trainer.accelerator.backward = measured_backward
    optimizer = trainer.create_optimizer()
    for _ in range(2):
        trainer.training_step(network, examples)
        optimizer.step()
        meter.mark("optimizer")
        optimizer.zero_grad()
    hook.remove()
    trainer.accelerator.backward = backward


def answer(bench: Bench, model: PaliGemma, trainer: LoRATrainer) -> Tensor:
    """Questions answered between steps, as an evaluation does."""
    batch = bench.batch(bench.examples(ANSWERS_AT_ONCE))
    with trainer.vision_on_device(), torch.inference_mode():
        features = model.encode_images(batch["pixel_values"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return model.generate(ids, attention_mask=mask, image_features=features, max_new_tokens=NEW_TOKENS)


def offload(bench: Bench) -> Iterator[Finding]:
    """What leaves the device when the vision encoder is kept in host memory, and stays away in a step's decoder."""
    model, examples = sole_model(bench), bench.examples(4)
    tower = sum(parameter.nbytes for parameter in model.vision_tower.parameters()) / GIB
    trainer = make_trainer(bench, model, examples, Mode(2, offload_vision=True), bench.scratch())
    trainer.training_step(trainer.network, examples)
    gradients_of(trained_parameters(model))
    bench.release()
    before = bench.card.allocated()
    with trainer.vision_on_device():
        within = bench.card.allocated()
    if not bench.card.is_cuda:
        raise SkippedError(SKIPPED_ON_CPU)
    figure = f"{within - before:.3f} GiB away, the vision encoder has {tower:.3f}"
    yield judged("offload", abs(within - before - tower) <= LIMIT * tower, figure, f"within {LIMIT:.0%}")


CONTENDERS: dict[str, Callable[[Bench], arms.Arm]] = {
    "ours": lambda bench: arms.ours_on(bench.adapted(torch.bfloat16), "nothing"),
    "ours-recompute": lambda bench: arms.ours_on(bench.adapted(torch.bfloat16), "layers"),
    "tuned": lambda bench: arms.tuned_on(bench.library(torch.bfloat16), bench.adapter_directory(), False),
    "tuned-checkpointing": lambda bench: arms.tuned_on(bench.library(torch.bfloat16), bench.adapter_directory(), True),
    "documented": lambda bench: arms.documented_on(bench.library(torch.bfloat16), bench.adapter_directory()),
}


def largest(bench: Bench) -> Iterator[Finding]:
    """The most rows at once under the cap, of each recipe."""
    bench.keep_only(torch.bfloat16)
    bench.adapter_directory()
    rows: dict[str, int] = {}
    for name, make in CONTENDERS.items():
        with bench.card.capped(CAP):
            fitted = find_largest(partial(attempt, bench, make), 1)
        rows[name] = max(fitted, default=0)
        best = max(fitted, key=lambda size: size / fitted[size]["seconds"], default=0)
        speed = best / fitted[best]["seconds"] if best else 0.0
        figure = f"{rows[name]} rows; {speed:.2f} samples/s at its best, with {best}"
        other = {"tuned": "ours", "tuned-checkpointing": "ours-recompute"}.get(name)
        bound = f"no more than {rows[other]}, of {other}" if other else NO_BOUND
        yield judged(f"largest.{name}", other is None or rows[name] <= rows[other], figure, bound, fitted=fitted)


def attempt(bench: Bench, make: Callable[[Bench], arms.Arm], rows: int) -> dict[str, Any] | None:
    """Seconds of a step of so many rows, and its peaks; None where there is no room."""
    try:
        return timed_step(bench, make, rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    finally:
        bench.release()
    return None


def timed_step(bench: Bench, make: Callable[[Bench], arms.Arm], rows: int) -> dict[str, Any]:
    bench.card.require_room(rows)
    batch = {name: tensor.to(bench.device) for name, tensor in arms.make_batch(bench.config, rows).items()}
    step = arms.take_step(make(bench))
    bench.card.reset_peak()
    step(batch, False)
    seconds = side_by_side.timed(lambda: step(batch, False), 2, bench.device)
    return {"seconds": seconds, **vars(bench.card.memory())}


def recovers(bench: Bench) -> Iterator[Finding]:
    """A step that finds no room is repeated in smaller micro-batches, and is the same step."""
    model, examples = sole_model(bench), bench.examples(EXAMPLES)
    trainer = make_trainer(bench, model, examples, Mode(EXAMPLES), bench.scratch(), micro_batch="auto")
    with (
        bench.card.capped(CAP),
        bench.card.little_room(model.language_model.model),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        trainer.training_step(trainer.network, examples)
        got = joined(gradients_of(trained_parameters(model)))
        rows = trainer.mode.micro_batch
        trainer.training_step(trainer.network, examples)
        again = joined(gradients_of(trained_parameters(model)))
    said = sum("out of memory" in str(warning.message) for warning in caught)
    figure = f"{said} times, from {EXAMPLES} to {rows} rows"
    yield judged("recovers", said >= 1 and rows < EXAMPLES, figure, "at least once", rows=rows)
    yield at_most("recovers.gradient", distance(got, again), 2**-7)


CHECKS: Part = {
    "phases": phases,
    "offload": offload,
    "recovers": recovers,
    "largest": largest,
}
