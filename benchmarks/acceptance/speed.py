"""How fast a step is beside the library's recipes, and where its time goes.

Contenders take turns in rounds, so that a clock that drifts does so for all of them; ratios are taken within a round.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import arms, side_by_side
from benchmarks.acceptance.bench import Bench, gradients_of
from benchmarks.acceptance.contenders import CONTENDERS
from benchmarks.acceptance.findings import NO_BOUND, Check, Finding, Part, SkippedError, at_most, judged
from finetune.lora.linear import LoRAConfig, inject_lora
from finetune.lora.nf4 import quantize
from finetune.lora.protocol import trained_parameters

ROUNDS, STEPS = 5, 3  # turns of each contender; steps timed in a turn
ROWS = (4, 16)  # of a step: where launches count, and where products do
DROPOUT = 0.05
SAME_LOSS = 0.02  # relative: bf16 and recipes that round in other places
TERA = 10**12
TOP = 5  # kernels that are named
Times = dict[str, list[float]]  # contender -> seconds of a step, one a round
Step = Callable[..., Any]  # takes a step; with True it says loss and gradient


def interleaved(bench: Bench, contenders: dict[str, Step]) -> Times:
    """Seconds of a step of each, round by round, after two that are not measured."""
    rounds, steps = (ROUNDS, STEPS) if bench.card.is_cuda else (2, 1)  # a CPU's times settle nothing
    for step in contenders.values():
        side_by_side.timed(step, 2, bench.device)
    times: Times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            times[name].append(side_by_side.timed(step, steps, bench.device))
    return times


def told(bench: Bench, label: str, times: Times, rows: int, pairs: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """A finding for each contender, and one for each pair, of which the first is to take no longer than the second."""
    for name, seconds in times.items():
        figure = f"{side_by_side.spread(seconds, 4)} s/step, {rows / statistics.median(seconds):.2f} samples/s"
        yield judged(f"{label}.{name}", True, figure, NO_BOUND, seconds=seconds, rows=rows)
    for first, second in pairs:
        ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
        name, figure = f"{label}.{first}/{second}", side_by_side.spread(ratios, 3)
        if not bench.card.is_cuda:
            yield Finding(name, "SKIP", f"{figure}: times of a small network on a CPU settle nothing")
            continue
        yield judged(name, statistics.median(ratios) <= 1.0, figure, "<= 1", ratios=ratios)


def same_losses(label: str, steps: Sequence[Step]) -> Finding:
    """Whether the contenders compute the same: their losses in bf16, in a step that is measured."""
    losses = [step(True)["loss"] for step in steps]
    apart = (max(losses) - min(losses)) / min(losses)
    return at_most(f"{label}.losses", apart, SAME_LOSS, "apart", losses=losses)


def stepper(arm: arms.Arm, batch: dict[str, Tensor]) -> Step:
    take = arms.take_step(arm)
    return lambda measure=False: take(batch, measure)


def batch_of(bench: Bench, rows: int) -> dict[str, Tensor]:
    return {name: tensor.to(bench.device) for name, tensor in arms.make_batch(bench.config, rows).items()}


def dense(rows: int) -> Check:
    """All recipes on a base in bf16."""

    def check(bench: Bench) -> Iterator[Finding]:
        bench.keep_only(torch.bfloat16)
        batch = batch_of(bench, rows)
        steps = {name: stepper(make(bench), batch) for name, make in CONTENDERS.items()}
        yield same_losses(f"batch-{rows}", list(steps.values()))
        times = interleaved(bench, steps)
        pairs = [("ours", "documented"), ("ours", "tuned"), ("ours-recompute", "tuned-checkpointing")]
        yield from told(bench, f"batch-{rows}", times, rows, pairs)

    return check


def profile(bench: Bench) -> Iterator[Finding]:
    """Where the time of a step goes, and how much of what the device can do is used."""
    bench.keep_only(torch.bfloat16)
    peak, source = bench.card.peak_flops()
    product = bench.card.measured_flops(torch.bfloat16)
    yield judged("peak", True, f"{peak / TERA:.3g} TFLOP/s ({source}); a large product {product / TERA:.3g}", NO_BOUND)
    rows = ROWS[0]
    step = stepper(CONTENDERS["ours"](bench), batch_of(bench, rows))
    seconds = [side_by_side.timed(step, STEPS, bench.device) for _ in range(3)][-1]
    found = bench.card.profile(step)
    kernels = list(found.kernels.items())
    whole = sum(found.kernels.values())
    for place, (name, microseconds) in enumerate(kernels[:TOP], 1):
        figure = f"{microseconds / whole:.1%}, {microseconds / 1000:.2f} ms: {name[:80]}"
        yield judged(f"kernel.{place}", True, figure, NO_BOUND)
    yield judged("busy", True, f"{found.busy:.1%} of a profiled step", NO_BOUND, kernels=kernels[:40])
    yield judged("launches", True, f"{found.launches} a step", NO_BOUND)
    work = flops(bench, rows)
    used = work / seconds / peak
    yield judged("mfu", True, f"{used:.1%}: {work / TERA:.3g} TFLOP in {seconds:.4f} s", NO_BOUND, peak=peak)


def flops(bench: Bench, rows: int) -> float:
    """Floating-point operations of a step's products, by our count."""
    from finetune.preflight.plan import Planner
    from finetune.training.execution_plan import ExecutionPlan

    tokens = bench.config.num_image_tokens + arms.PREFIX_TOKENS + arms.SUFFIX_TOKENS
    lora = LoRAConfig(rank=arms.RANK, alpha=arms.RANK)
    planner = Planner(bench.config, lora, torch.bfloat16, tokens, arms.SUFFIX_TOKENS, rows, bench.device)
    return planner.tflop(ExecutionPlan(rows)) * rows * TERA


def dropout(bench: Bench) -> Iterator[Finding]:
    """A step of the trainer, with dropout and without."""
    from benchmarks.acceptance.training import make_trainer
    from finetune.training.execution_plan import ExecutionPlan

    bench.keep_only(torch.bfloat16)
    rows = ROWS[0]
    examples = bench.examples(rows)

    def trainer_step(p: float) -> Step:
        model = bench.adapted(torch.bfloat16, p)
        trainer = make_trainer(bench, model, examples, ExecutionPlan(rows), bench.scratch())
        trained = trained_parameters(model)

        def step() -> None:
            trainer.training_step(trainer.network, examples)
            gradients_of(trained)
            trainer.losses.clear()

        return step

    times = interleaved(bench, {"none": trainer_step(0.0), "dropout": trainer_step(DROPOUT)})
    yield from told(bench, "trainer", times, rows, [])
    ratios = [a / b for a, b in zip(times["dropout"], times["none"], strict=True)]
    yield judged("trainer.dropout/none", True, side_by_side.spread(ratios, 3), NO_BOUND, ratios=ratios)


def nf4(bench: Bench) -> Iterator[Finding]:
    """The decoder in NF4: ours beside the documented recipe."""
    import bitsandbytes  # noqa: F401 (or the check is skipped)

    bench.keep_only(torch.bfloat16)
    batch = batch_of(bench, ROWS[0])

    def ours() -> arms.Arm:
        model = quantize(bench.ours(torch.bfloat16), bench.device)
        inject_lora(model, LoRAConfig(rank=arms.RANK, alpha=arms.RANK))
        side_by_side.randomize_adapters(model, bench.device)
        return arms.ours_on(model, "layers")

    library = arms.documented_on(library_in_nf4(bench), bench.adapter_directory())
    steps = {"ours": stepper(ours(), batch), "documented": stepper(library, batch)}
    yield same_losses("nf4", list(steps.values()))
    times = interleaved(bench, steps)
    yield from told(bench, "nf4", times, ROWS[0], [("ours", "documented")])


def library_in_nf4(bench: Bench) -> Any:
    """The library's network, its decoder's linears in bitsandbytes' modules."""
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    model, settings = bench.library(torch.bfloat16), {"compress_statistics": True, "quant_type": "nf4"}
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "language_model.layers." in path:
            size = linear.in_features, linear.out_features
            packed = bitsandbytes.nn.Linear4bit(
                *size, bias=False, compute_dtype=torch.bfloat16, device="meta", **settings
            )
            weight = bitsandbytes.nn.Params4bit(linear.weight.detach(), requires_grad=False, **settings)
            packed.weight = weight.to(bench.device)
            model.set_submodule(path, packed)
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model


def liger(bench: Bench) -> Iterator[Finding]:
    """The documented recipe with liger-kernel's patch, which changes the library for the rest of the process."""
    from liger_kernel.transformers import apply_liger_kernel_to_paligemma

    bench.keep_only(torch.bfloat16)
    batch = batch_of(bench, ROWS[0])
    ours = stepper(CONTENDERS["ours"](bench), batch)
    apply_liger_kernel_to_paligemma()
    patched = stepper(CONTENDERS["documented"](bench), batch)
    try:
        patched()
    except Exception as error:
        raise SkippedError(f"liger-kernel's patch does not run here: {type(error).__name__}: {error}") from error
    times = interleaved(bench, {"ours": ours, "liger": patched})
    yield from told(bench, "liger", times, ROWS[0], [("ours", "liger")])


CHECKS: Part = {
    **{f"batch-{rows}": dense(rows) for rows in ROWS[:1]},
    "profile": profile,
    **{f"batch-{rows}": dense(rows) for rows in ROWS[1:]},
    "dropout": dropout,
    "nf4": nf4,
    "liger": liger,
}
