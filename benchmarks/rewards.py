"""From answers to rewards: what the official VQA accuracy gains where it is learned from itself; as a table and a plot.

    python -m benchmarks.rewards                        train what is missing, write the table and the plot
    python -m benchmarks.rewards --workers 4 --seeds 1 2

Trains configs/rewards/start.yaml on scenes whose annotators disagree, and from its adapter on the two other
configurations there, with several seeds (study.py) and as many steps: `reward` learns from what its own answers are
worth, `supervised` goes on with the annotators' answers. With one seed both see the same questions in the same order.
Of each run, after its last step, whichever step it keeps:

- accuracy: VQA accuracy of the most likely answers to all validation questions, also after fewer steps, for the plot;
- drawn: that of answers drawn from the network, one to each validation question, which is what rewards raise;
- KL: log p - log p_ref of the answers drawn in the last steps that were logged, in nats a token: how far the network
  has gone from what it began with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.answers import last_state, opened
from benchmarks.study import (
    ROOT,
    Job,
    begin_mark,
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
from finetune.evaluation.evaluate import evaluate
from finetune.evaluation.tasks import TASKS
from finetune.system.console import show
from finetune.training.examples import max_new_tokens, open_processor
from finetune.training.result import Result
from finetune.training.setup import adapt, open_model
from model import PaliGemma

NAME = "benchmarks.rewards"
CONFIGS = ROOT / "configs/rewards"
START, ARMS = CONFIGS / "start.yaml", ("reward", "supervised")
PLAIN = "supervised"  # what rewards are compared with
BEGIN = begin_mark(NAME)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a finished run came to.

    Attributes:
        accuracy: (step, VQA accuracy in percent) at each evaluation.
        drawn: VQA accuracy in percent of drawn answers, after the last step.
        kl: in nats a token; None of a run without rewards.
    """

    accuracy: list[tuple[int, float]]
    drawn: float
    kl: float | None


def measured(job: Job, overrides: Sequence[str]) -> Measured:
    """What a finished run wrote into metrics.jsonl, and what its last state is worth."""
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    accuracy = [(line["step"], line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
    kl = next((line["kl"] for line in reversed(lines) if "kl" in line), None)
    return Measured(accuracy, drawn_accuracy(*last_state(job, overrides)), kl)


def start_of(job: Job, overrides: Sequence[str]) -> tuple[RunConfig, PaliGemma]:
    """The configuration of a run, and its network before the first step."""
    config = load_config(job.config, [*overrides, *job.changes])
    adapt(model := open_model(Path(config.model.path), config), config)
    return config, model


def drawn_accuracy(config: RunConfig, model: PaliGemma) -> float:
    """VQA accuracy, in percent, of an answer to each validation question that is drawn at temperature 1."""
    processor, records = open_processor(Path(config.model.path), config), opened(config, "validation").valid
    longest, rows = max_new_tokens(config, opened(config, "train").lengths), config.evaluation.batch_size
    found = evaluate(model, processor, records, TASKS["vqa"], longest, batch_size=rows, temperature=1.0, seed=0)
    return found.score.overall


def table(start: tuple[float, float], results: Mapping[str, Sequence[Measured]]) -> list[str]:
    """A row for each network, as Markdown. start: accuracy, and that of drawn answers, with which all begin."""
    above = f"to `{PLAIN}`"
    rows = [["", "accuracy", above, "drawn", above, "KL"], ["---", *["---:"] * 5]]
    rows.append(["start", f"{start[0]:.1f}", "", f"{start[1]:.1f}", "", ""])
    accuracies = {arm: [run.accuracy[-1][1] for run in runs] for arm, runs in results.items()}
    drawn = {arm: [run.drawn for run in runs] for arm, runs in results.items()}
    for arm, runs in results.items():
        cells = []
        for values in (accuracies, drawn):
            cells.append(f"**{interval(values[arm])}**")
            cells.append("" if arm == PLAIN else f"{interval(differences(values[arm], values[PLAIN])):+.1f}")
        kl = [run.kl for run in runs if run.kl is not None]
        rows.append([f"`{arm}`", *cells, f"{interval(kl):.2f}" if kl else ""])
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
    figures = {arm: [run.accuracy[-1][1] for run in runs] for arm, runs in results.items()}
    figures |= {f"{arm}, drawn": [run.drawn for run in runs] for arm, runs in results.items()}
    draw_seeds(right, figures, "VQA accuracy, percent: mean, 95% interval, and each seed")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main(argv: Sequence[str]) -> None:
    parser = study_parser(NAME, __doc__, "alignment.md")
    arguments = parse(parser, argv)
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
    results = {arm: [measured(job, overrides) for job in of_arm] for arm, of_arm in jobs.items()}
    drawn = drawn_accuracy(*start_of(jobs[PLAIN][0], overrides))
    write_table(arguments.document, BEGIN, lines := table((kept.metric_value, drawn), results))
    plot(arguments.plot, kept.metric_value, results)
    show("\n".join(lines), f"written into {arguments.document}, beside {arguments.plot}")


if __name__ == "__main__":
    cli.run(main)
