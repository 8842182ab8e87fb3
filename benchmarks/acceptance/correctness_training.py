"""Whether the trainer is right on the device: however a step is cut, recomputed, offloaded and dropped out, beside PEFT
over several steps, resumed, and without making the host wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import arms
from benchmarks.acceptance.bench import Bench
from benchmarks.acceptance.findings import Finding, SkippedError, at_most, judged
from benchmarks.acceptance.rounding import FLOOR, NEAR, TWICE, beside, distance, joined, worst
from benchmarks.acceptance.training import (
    BETAS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    make_trainer,
    quiet,
    step_gradients,
)
from finetune.lora.protocol import trained_parameters
from finetune.training.batch_sampler import BatchSampler
from finetune.training.execution_plan import ExecutionPlan

ROWS = 6
DROPOUT = 0.3
STEPS = 20


def execution_plans(layers: int) -> dict[str, ExecutionPlan]:
    """Ways to take one step, which give the same gradients."""
    return {
        "micro_batches": ExecutionPlan(2),
        "single_rows": ExecutionPlan(1),
        "recompute_half": ExecutionPlan(ROWS, layers // 2),
        "recompute_all": ExecutionPlan(ROWS, layers),
        "offload_vision": ExecutionPlan(ROWS, offload_vision=True),
        "all_together": ExecutionPlan(2, layers, offload_vision=True),
    }


def cuts(bench: Bench) -> Iterator[Finding]:
    """Gradients of a step by each execution plan, without dropout and with it: the masks do not depend on the cut."""
    yield from by_each_execution_plan(bench, "step", 0.0)


def dropout(bench: Bench) -> Iterator[Finding]:
    yield from by_each_execution_plan(bench, "dropout", DROPOUT)
    examples = bench.examples(ROWS)
    without, dropped = (step_gradients(bench, torch.float32, ExecutionPlan(ROWS), examples, p) for p in (0.0, DROPOUT))
    change = distance(joined(dropped), joined(without))
    yield judged("dropout.acts", change >= 0.01, f"{change:.2g}", ">= 0.01 of the gradient", value=change)


def by_each_execution_plan(bench: Bench, name: str, p: float) -> Iterator[Finding]:
    examples, whole = bench.examples(ROWS), ExecutionPlan(ROWS)
    truth = step_gradients(bench, torch.float64, whole, examples, p)
    bench.keep_only(torch.float32)
    far = worst(step_gradients(bench, torch.float32, whole, examples, p), truth)
    yield at_most(f"{name}.whole", far, NEAR)
    for label, execution_plan in execution_plans(bench.config.text.num_hidden_layers).items():
        got = worst(step_gradients(bench, torch.float32, execution_plan, examples, p), truth)
        yield beside(f"{name}.{label}", got, far, "the whole step's")
        bench.release()


def steps(bench: Bench) -> Iterator[Finding]:
    """Losses and adapters over several optimizer steps: ours by the trainer, PEFT's by a plain loop."""
    examples, size = bench.examples(8), 4

    def ours(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = bench.adapted(dtype)
        trainer = make_trainer(bench, model, examples, ExecutionPlan(2), bench.scratch(), size, STEPS)
        with quiet():
            trainer.train()
        return trainer.curve, joined(trained_parameters(model))

    def peft() -> tuple[Tensor, Tensor]:
        trained, model = arms.library_on(bench.library(torch.float32), bench.adapter_directory(), False, False)
        optimizer = torch.optim.AdamW(trained.values(), LEARNING_RATE, BETAS, weight_decay=0.0)
        losses = []
        for pairs in BatchSampler((len(examples),), size, 0, STEPS):
            loss = model(**bench.batch([examples[index] for index, _ in pairs]), use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).double(), joined(trained)

    truth = ours(torch.float64)
    bench.keep_only(torch.float32)
    start = joined(trained_parameters(bench.adapted(torch.float32)))
    mine, theirs = ours(torch.float32), peft()
    moved = distance(truth[1], start)
    yield judged("steps.learn", moved >= 0.01, f"adapters moved by {moved:.2g}", ">= 0.01", value=moved)
    # AdamW makes full steps of gradients that are next to nothing, so of rounding, too: adapters may be further off.
    for place, (name, limit) in enumerate((("losses", NEAR), ("adapters", 10 * NEAR))):
        far = distance(theirs[place], truth[place])
        yield at_most(f"steps.{name}.peft", far, limit)
        yield beside(f"steps.{name}", distance(mine[place], truth[place]), far, "PEFT's", curve=mine[0].tolist())


def resume(bench: Bench) -> Iterator[Finding]:
    """A run that is resumed from its checkpoint ends where it would have: bit for bit, if the device repeats itself."""
    examples = bench.examples(8)

    def run(checkpoint: str | None = None) -> tuple[Tensor, str]:
        model, output = bench.adapted(torch.float32, 0.1), bench.scratch()
        trainer = make_trainer(bench, model, examples, ExecutionPlan(2), output, 4, 6, save_every=3)
        with quiet():
            trainer.train(resume_from_checkpoint=checkpoint)
        return joined(trained_parameters(model)).clone(), str(output / "checkpoints" / "step-000003")

    (first, checkpoint), (second, _) = run(), run()
    resumed, _ = run(checkpoint)
    again, far = distance(second, first), distance(resumed, first)
    limit = max(TWICE * again, FLOOR) if bench.card.is_cuda else 0.0
    figure = "bit-equal" if far == 0 else f"{far:.2g}"
    bound = f"<= {limit:.2g}; the same run twice {again:.2g}"
    yield judged("resume", far <= limit, figure, bound, resumed=far, repeated=again)


def synchronisations(bench: Bench) -> Iterator[Finding]:
    """How often the host waits for the device in a micro-batch, from steps of the same rows in 2 and in 8 of them."""
    examples, counted = bench.examples(8), dict[int, Counter[str]]()
    for rows in (4, 1):
        trainer = make_trainer(
            bench, bench.adapted(torch.bfloat16, 0.1), examples, ExecutionPlan(rows), bench.scratch()
        )
        trainer.training_step(trainer.network, examples)
        with bench.card.synchronisations() as counted[rows]:
            trainer.training_step(trainer.network, examples)
    if not bench.card.is_cuda:
        raise SkippedError("nothing synchronises on a CPU")
    few, many = (sum(counted[rows].values()) for rows in (4, 1))
    lines = dict(counted[1].most_common())
    yield at_most("syncs", (many - few) / 6, 1.0, "per micro-batch", lines=lines)
    yield judged("syncs.step", True, f"{few - (many - few) / 3:.3g} besides, per step", "no bound", lines=lines)
