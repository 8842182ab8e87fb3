"""Which connector: every configuration in configs/connectors trained with several seeds, as a table and a plot.

    python -m benchmarks.connectors                        train what is missing, write the table and the plot
    python -m benchmarks.connectors --workers 4 --seeds 1 2 3

The figure of a run (study.py) is the VQA accuracy on all validation questions after its last step, whichever step it
keeps: keeping the best of several would favor arms whose accuracy varies more. Differences are taken seed by seed: with
the same seed, all arms see the same examples in the same order.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.study import (
    ROOT,
    Job,
    begin_mark,
    by_type,
    differences,
    draw_seeds,
    interval,
    parse,
    study_parser,
    train_all,
    write_table,
)
from finetune import cli
from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.config.stages import runs_of
from finetune.preflight.plan import Planner
from finetune.preflight.run_plan import plan_run
from finetune.system.console import show
from finetune.training.examples import network_config, open_examples, open_processor
from finetune.training.execution_plan import ExecutionPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "benchmarks.connectors"
CONFIGS = ROOT / "configs/connectors"
ARMS = ("linear", "mlp", "dense_sci", "dense_dci", "dense_dci_random", "resampler", "pixel_shuffle")
REFERENCE = "linear"  # what the others are compared with
ROLLING = 3  # logged losses that a point of the plot is the mean of: batches differ more than arms do
BEGIN = begin_mark(NAME)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a finished run came to.

    Attributes:
        accuracy: percent, under "overall" and each answer type.
        loss: mean over the tokens of the validation answers.
        losses: (step, mean training loss of the steps before it since the last one), the stages' steps counted first.
    """

    accuracy: dict[str, float]
    loss: float
    losses: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an arm costs, counted: image tokens, parameters of its connector, GFLOP of an example, MiB of a row."""

    image_tokens: int
    parameters: int
    gflop: float
    mib: float


def measured(job: Job, overrides: Sequence[str] = ()) -> Measured:
    """What a finished run and its stages wrote into metrics.jsonl."""
    losses: list[tuple[int, float]] = []
    evaluation: dict[str, float] = {}
    before = 0
    for run in runs_of(load_config(job.config, [*overrides, *job.changes])):
        for line in map(json.loads, Path(run.output, "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
            if "loss" in line:
                losses.append((before + line["step"], line["loss"]))
            elif "eval_accuracy" in line:
                evaluation = line
        before = losses[-1][0]
    accuracy = {"overall": evaluation["eval_accuracy"], **by_type(evaluation)}
    return Measured(accuracy, evaluation["eval_loss"], losses)


def cost_of(config: RunConfig) -> Cost:
    """What one example takes in the run itself, after its stages, counted in a network without values."""
    directory = Path(config.model.path)
    network = network_config(directory, config)
    longest = open_examples(config, "train", open_processor(directory, config)).longest
    planner: Planner = plan_run(config, network, longest).planner
    one_row = ExecutionPlan(micro_batch=1, recompute_layers=0, offload_vision=False)
    connector = sum(p.numel() for p in planner.model.multi_modal_projector.parameters() if p.requires_grad)
    bytes_of_two = planner.activations(dataclasses.replace(one_row, micro_batch=2))
    of_a_row = bytes_of_two - planner.activations(one_row)  # without what is saved once, however many rows there are
    return Cost(network.num_image_tokens, connector, 1000 * planner.tflop(one_row), of_a_row / 2**20)


def table(costs: dict[str, Cost], results: dict[str, list[Measured]]) -> list[str]:
    """A row for each arm, as Markdown."""
    types = sorted(name for name in results[REFERENCE][0].accuracy if name != "overall")
    counted = ["image tokens", "trained of it", "GFLOP an example", "MiB a row"]
    rows = [["connector", *counted, "loss", "to linear", "accuracy", "to linear", *types]]
    rows.append(["---", *("---:" for _ in rows[0][1:])])
    loss, accuracy = ({arm: [get(run) for run in runs] for arm, runs in results.items()} for get in (loss_of, overall))
    for arm, runs in results.items():
        cost = costs[arm]
        counts = [str(cost.image_tokens), f"{cost.parameters:,}", f"{cost.gflop:.2f}", f"{cost.mib:.2f}"]
        by_answer = [f"{interval([run.accuracy[kind] for run in runs])}" for kind in types]
        above = ["", ""]
        if arm != REFERENCE:
            above = [f"{interval(differences(loss[arm], loss[REFERENCE])):+z.4f}"]
            above += [f"{interval(differences(accuracy[arm], accuracy[REFERENCE])):+z.1f}"]
        measured = [f"{interval(loss[arm]):.4f}", above[0], f"**{interval(accuracy[arm])}**", above[1]]
        rows.append([f"`{arm}`", *counts, *measured, *by_answer])
    return ["| " + " | ".join(row) + " |" for row in rows]


def loss_of(run: Measured) -> float:
    return run.loss


def overall(run: Measured) -> float:
    return run.accuracy["overall"]


def plot(file: Path, results: dict[str, list[Measured]]) -> None:
    """Training losses over the steps, and accuracies with their intervals, side by side."""
    import matplotlib as mpl

    mpl.use("agg")  # draws into a file, without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, results)
    accuracies = {arm: [overall(run) for run in runs] for arm, runs in results.items()}
    draw_seeds(right, accuracies, "VQA accuracy, percent: mean, 95% interval, and each seed")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def draw_losses(axes: Axes, results: dict[str, list[Measured]]) -> None:
    """A line for each arm: the mean over its seeds of rolling means; a band: its 95% interval."""
    for arm, runs in results.items():
        steps = [step for step, _ in runs[0].losses]
        means = [interval(values) for values in zip(*(rolling(run.losses) for run in runs), strict=True)]
        (line,) = axes.plot(steps, [m.mean for m in means], label=arm, linewidth=1.3)
        low, high = ([m.mean + sign * m.half for m in means] for sign in (-1, 1))
        axes.fill_between(steps, low, high, alpha=0.1, color=line.get_color(), linewidth=0)
    axes.set(xlabel="step, alignment included", ylabel=f"training loss, mean of {ROLLING} logged ones")
    axes.legend(fontsize=8)


def rolling(losses: Sequence[tuple[int, float]]) -> list[float]:
    """For each logged loss the mean of it and those before it, ROLLING in all."""
    values = [loss for _, loss in losses]
    return [statistics.mean(values[max(0, i + 1 - ROLLING) : i + 1]) for i in range(len(values))]


def main(argv: Sequence[str]) -> None:
    parser = study_parser(NAME, __doc__, "connectors.md")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="configurations; default: all")
    arguments = parse(parser, argv)
    if REFERENCE not in arguments.arms:
        raise ValueError(f"--arms {' '.join(arguments.arms)}: {REFERENCE}, which they are compared with, is missing")
    study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """Train, read, and write."""
    runs, seeds = arguments.runs, arguments.seeds
    configs = {arm: CONFIGS / f"{arm}.yaml" for arm in arguments.arms}
    jobs = {arm: [Job(config, seed, runs / arm / f"seed{seed}") for seed in seeds] for arm, config in configs.items()}
    by_seed = [job for together in zip(*jobs.values(), strict=True) for job in together]
    train_all(by_seed, arguments.workers, arguments.overrides)
    results = {arm: [measured(job, arguments.overrides) for job in of_arm] for arm, of_arm in jobs.items()}
    costs = {arm: cost_of(load_config(config, arguments.overrides)) for arm, config in configs.items()}
    write_table(arguments.document, BEGIN, lines := table(costs, results))
    plot(arguments.plot, results)
    show("\n".join(lines), f"written into {arguments.document}, beside {arguments.plot}")


if __name__ == "__main__":
    cli.run(main)
