"""From answers to rewards: what the official VQA accuracy gains where it is learned from itself; as a table and a plot.

    python -m benchmarks.rewards                        train what is missing, write the table and the plot
    python -m benchmarks.rewards --workers 4 --seeds 1 2

Trains configs/rewards/start.yaml on scenes whose annotators disagree, and from its adapter on the two other
configurations there, with several seeds (study.py) and as many steps: `reward` learns from what its own answers are
worth, `supervised` goes on with the annotators' answers. With one seed both see the same questions in the same order.
Of each run, after its last step, whichever step it keeps:

- accuracy: VQA accuracy of the most likely answers to all validation questions, also after fewer steps, for the plot;
- reward: what the answers to training questions that it draws are worth on average, in percent, in the first and in the
  last steps that were logged;
- KL: log p - log p_ref of the latter, in nats a token: how far the network has gone from what it began with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.study import (
    ROOT,
    T_975,
    Job,
    begin_mark,
    differences,
    draw_seeds,
    interval,
    train_all,
    write_table,
)
from finetune import cli
from finetune.system.console import show
from finetune.system.paths import path_argument
from finetune.training.result import Result

NAME = "benchmarks.rewards"
CONFIGS = ROOT / "configs/rewards"
START, ARMS = CONFIGS / "start.yaml", ("reward", "supervised")
BEGIN = begin_mark(NAME)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a finished run came to.

    Attributes:
        accuracy: (step, VQA accuracy in percent) at each evaluation.
        rewards: what drawn answers are worth in the first and in the last steps that were logged, in percent, and how
            far the latter have gone from the reference, in nats a token; None of a run that draws none.
    """

    accuracy: list[tuple[int, float]]
    rewards: tuple[float, float, float] | None = None


def measured(run: Path) -> Measured:
    """What a finished run wrote into metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    accuracy = [(line["step"], line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
    if not (drawn := [line for line in lines if "reward" in line]):
        return Measured(accuracy)
    return Measured(accuracy, (100 * drawn[0]["reward"], 100 * drawn[-1]["reward"], drawn[-1]["kl"]))


def table(start: float, results: Mapping[str, Sequence[Measured]]) -> list[str]:
    """A row for each network, as Markdown. start: the accuracy that all begin with."""
    rows = [["", "accuracy", "to the start", "to `supervised`", "reward, first", "last", "KL"], ["---", *["---:"] * 6]]
    rows.append(["start", f"{start:.1f}", *[""] * 5])
    accuracies = {arm: [run.accuracy[-1][1] for run in runs] for arm, runs in results.items()}
    for arm, of_arm in accuracies.items():
        gained = f"{interval([accuracy - start for accuracy in of_arm]):+.1f}"
        above = f"{interval(differences(of_arm, accuracies['supervised'])):+.1f}" if arm != "supervised" else ""
        drawn = [run.rewards for run in results[arm] if run.rewards is not None]
        columns = map(interval, zip(*drawn, strict=True))
        figures = [f"{column:{spec}}" for column, spec in zip(columns, (".1f", ".1f", ".2f"), strict=bool(drawn))]
        rows.append([f"`{arm}`", f"**{interval(of_arm)}**", gained, above, *(figures or [""] * 3)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def plot(file: Path, start: float, results: Mapping[str, Sequence[Measured]]) -> None:
    """Accuracies over the steps, and after the last one with their intervals, side by side."""
    import matplotlib as mpl

    mpl.use("agg")  # draws into a file, without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, runs in results.items():
        steps = [0, *(step for step, _ in runs[0].accuracy)]
        at_each = [interval([value for _, value in values]) for values in zip(*(r.accuracy for r in runs), strict=True)]
        means, halves = [start, *(m.mean for m in at_each)], [0.0, *(m.half for m in at_each)]
        (line,) = left.plot(steps, means, "o-", label=arm, linewidth=1.3, markersize=4)
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        left.fill_between(steps, low, high, alpha=0.1, color=line.get_color(), linewidth=0)
    left.set(xlabel="step", ylabel="VQA accuracy, percent: mean and 95% interval")
    left.legend(fontsize=8)
    last = {arm: [run.accuracy[-1][1] for run in runs] for arm, runs in results.items()}
    draw_seeds(right, last, "VQA accuracy after the last step: mean, 95% interval, and each seed")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over every configuration")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="default: 1 2 3 4 5")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each with one thread; default: 2")
    parser.add_argument("--runs", type=path_argument, default=ROOT / "runs/rewards", help="directory of all runs")
    parser.add_argument("--document", type=path_argument, default=ROOT / "docs/alignment.md", help="with the table")
    parser.add_argument("--plot", type=path_argument, default=ROOT / "docs/rewards.png", help="file of the plot")
    arguments = parser.parse_intermixed_args(argv)
    if not 2 <= len(set(arguments.seeds)) == len(arguments.seeds) <= len(T_975) + 1:
        raise ValueError(f"--seeds {arguments.seeds}: expected 2 to {len(T_975) + 1} different ones")
    study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """Train, measure, and write."""
    begin = Job(START, 0, arguments.runs / "start")
    train_all([begin], 1, arguments.overrides)
    kept = Result.read(begin.output)
    assert kept is not None, "the run is finished"
    assert kept.metric_value is not None, "it evaluates"
    jobs: dict[str, list[Job]] = {
        arm: [Job(CONFIGS / f"{arm}.yaml", seed, arguments.runs / arm / f"seed{seed}") for seed in arguments.seeds]
        for arm in ARMS
    }
    overrides = [f"lora.start_from={begin.output}", *arguments.overrides]
    train_all([job for together in zip(*jobs.values(), strict=True) for job in together], arguments.workers, overrides)
    results = {arm: [measured(job.output) for job in of_arm] for arm, of_arm in jobs.items()}
    write_table(arguments.document, BEGIN, lines := table(kept.metric_value, results))
    plot(arguments.plot, kept.metric_value, results)
    show("\n".join(lines), f"written into {arguments.document}, beside {arguments.plot}")


if __name__ == "__main__":
    cli.run(main)
