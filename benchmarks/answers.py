"""Which answers of a question to learn from: one in turn, the most frequent, or all in one row; as a table and a plot.

    python -m benchmarks.answers                        train what is missing, write the table and the plot
    python -m benchmarks.answers --workers 4 --seeds 1 2 3

Every configuration in configs/answers is trained with several seeds (study.py), on scenes whose annotators disagree. A
visit is a question in a step; with the same seed all arms visit the same questions in the same order. Of each run,
after its last step, whichever step it keeps:

- accuracy: VQA accuracy on all validation questions, also after fewer visits, for the plot;
- expected loss: cross-entropy in nats a token over what the annotators of the validation questions said, each answer
  weighted by its share of them, which is what the loss of `all` is;
- gradient variance: how far the gradients of steps are from their mean on the same weights, those of `rotate` after its
  last step with the first seed: the trace of their covariance, as a multiple of that of `rotate` on the same steps. The
  gradient of `majority` has another mean, and its variance is not that of an estimate of the others'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

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
from data import PaliGemmaDataset, collate
from data.dataset import Answers
from finetune import cli
from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.lora.protocol import trained_parameters
from finetune.preflight.run_plan import plan_run
from finetune.system.console import show
from finetune.system.progress import progress_bar
from finetune.training.batch_sampler import BatchSampler
from finetune.training.checkpoints import checkpoints, read_parameters
from finetune.training.examples import Examples, network_config, open_examples, open_processor
from finetune.training.execution_plan import ExecutionPlan
from finetune.training.gradient_accumulation import GradientAccumulation
from finetune.training.objective import supervised
from finetune.training.setup import adapt, open_model
from finetune.training.step_inputs import Example
from model import PaliGemma

NAME = "benchmarks.answers"
CONFIGS = ROOT / "configs/answers"
ARMS: tuple[Answers, ...] = ("rotate", "majority", "all")
REFERENCE = "rotate"  # what the others are compared with
BEGIN = begin_mark(NAME)
ORDER_SEED = 1000  # of the steps whose gradients are compared


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a finished run came to.

    Attributes:
        accuracy: (visits, VQA accuracy in percent) at each evaluation.
        expected_loss: in nats a token, after the last step.
    """

    accuracy: list[tuple[int, float]]
    expected_loss: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an arm costs, counted: answers of a row and tokens of it on average, GFLOP of an example of that length."""

    answers: float
    tokens: float
    gflop: float


def last_state(job: Job, overrides: Sequence[str]) -> tuple[RunConfig, PaliGemma]:
    """The configuration of a finished run, and its network as its last checkpoint has it."""
    config = load_config(job.config, [*overrides, *job.changes])
    model = open_model(Path(config.model.path), config)
    adapt(model, config, anew=True)
    read_parameters(checkpoints(job.output / "checkpoints")[-1], trained_parameters(model))
    return config, model


def opened(config: RunConfig, split: str) -> Examples:
    """The examples of a run's training or validation data."""
    return open_examples(config, split, open_processor(Path(config.model.path), config))


def measured(job: Job, overrides: Sequence[str]) -> Measured:
    """What a finished run wrote into metrics.jsonl, and what its last state is worth."""
    config, model = last_state(job, overrides)
    lines = map(json.loads, (job.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    evaluations = [line for line in lines if "eval_accuracy" in line]
    accuracy = [(line["step"] * config.train.batch_size, line["eval_accuracy"]) for line in evaluations]
    return Measured(accuracy, expected_loss(config, model.eval()))


@torch.inference_mode()
def expected_loss(config: RunConfig, model: PaliGemma) -> float:
    """Cross-entropy over the annotators of data.validation, in nats a token."""
    processor = open_processor(Path(config.model.path), config)
    dataset = PaliGemmaDataset(opened(config, "validation").valid, processor, "all")
    total, tokens, size = 0.0, 0.0, config.evaluation.batch_size
    for start in range(0, len(dataset), size):
        examples = [dataset[index] for index in range(start, min(start + size, len(dataset)))]
        batch = {name: tensor.to(model.device) for name, tensor in collate(examples, processor.pad_id).items()}
        loss = model(**batch, num_items_in_batch=1).loss
        assert isinstance(loss, Tensor), "labels were given"
        total, tokens = total + float(loss), tokens + supervised(examples)
    return total / tokens


def gradient_variances(job: Job, overrides: Sequence[str], steps: int) -> dict[Answers, float]:
    """Of `rotate` and `all` the trace of the covariance of the gradients of `steps`, on the last state of a run."""
    config, model = last_state(job, overrides)
    processor, examples = open_processor(Path(config.model.path), config), opened(config, "train")
    size = config.train.batch_size
    order = BatchSampler(examples.sizes, size, ORDER_SEED, steps)
    trained = trained_parameters(model.train())
    plan = ExecutionPlan(size if config.train.micro_batch == "auto" else config.train.micro_batch)
    made = GradientAccumulation(model, trained, config.train, plan, partial(collate, pad_id=processor.pad_id))

    def gradient_of(batch: list[Example]) -> Tensor:
        model.zero_grad()
        made.accumulate(batch, supervised(batch), step=0)
        return torch.cat([gradient.flatten() for gradient in made.gradients()])

    variances: dict[Answers, float] = {}
    for answers in ("rotate", "all"):
        dataset = PaliGemmaDataset(examples.records, processor, answers, config.train.seed, examples.skipped)
        batches = progress_bar(f"gradients of {answers}", "step", order)
        variances[answers] = trace_of_covariance(gradient_of([dataset[pair] for pair in batch]) for batch in batches)
    return variances


def trace_of_covariance(vectors: Iterable[Tensor]) -> float:
    """Of at least two vectors f32 [P], the unbiased estimate, added up in fp64 as they come (Welford's algorithm)."""
    mean, total, count = torch.zeros(()), 0.0, 0
    for vector in vectors:
        count += 1
        off = vector.double() - mean
        mean = mean + off / count
        total += float(off @ (vector.double() - mean))
    return total / (count - 1)


def cost_of(config: RunConfig) -> Cost:
    """What one example takes in rows of mean length, counted in a network without values."""
    examples = opened(config, "train")
    planner = plan_run(config, network_config(Path(config.model.path), config), examples.longest).planner
    tokens = planner.config.num_image_tokens + 1 + examples.lengths.mean_text
    supervised_tokens = max(1, round(examples.lengths.mean_supervised))
    tflop = planner.tflop_of_length(ExecutionPlan(1), round(tokens), supervised_tokens)
    records = examples.valid["answers"][:]
    distinct = sum(len(set(answers)) for answers in records) / len(records) if config.data.answers == "all" else 1.0
    return Cost(distinct, tokens, 1000 * tflop)


def table(costs: dict[str, Cost], results: dict[str, list[Measured]], variances: dict[Answers, float]) -> list[str]:
    """A row for each arm, as Markdown."""
    counted = ["answers a row", "tokens a row", "GFLOP an example"]
    above = f"to `{REFERENCE}`"
    rows = [["`data.answers`", *counted, "expected loss", above, "accuracy", above, "gradient variance"]]
    rows.append(["---", *("---:" for _ in rows[0][1:])])
    losses = {arm: [run.expected_loss for run in runs] for arm, runs in results.items()}
    accuracies = {arm: [run.accuracy[-1][1] for run in runs] for arm, runs in results.items()}
    for arm, cost in costs.items():
        compared = ["", ""]
        if arm != REFERENCE:
            compared = [f"{interval(differences(losses[arm], losses[REFERENCE])):+z.3f}"]
            compared += [f"{interval(differences(accuracies[arm], accuracies[REFERENCE])):+z.1f}"]
        variance = f"{variances[arm] / variances[REFERENCE]:.2f}" if arm in variances else ""  # type: ignore[index]
        counts = [f"{cost.answers:.1f}", f"{cost.tokens:.1f}", f"{cost.gflop:.3f}"]
        loss, accuracy = f"**{interval(losses[arm]):.3f}**", f"**{interval(accuracies[arm])}**"
        rows.append([f"`{arm}`", *counts, loss, compared[0], accuracy, compared[1], variance])
    return ["| " + " | ".join(row) + " |" for row in rows]


def plot(file: Path, results: dict[str, list[Measured]]) -> None:
    """Accuracies over the visits, and expected losses with their intervals, side by side."""
    import matplotlib as mpl

    mpl.use("agg")  # draws into a file, without a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, runs in results.items():
        visits = [number for number, _ in runs[0].accuracy]
        means = [interval([value for _, value in values]) for values in zip(*(r.accuracy for r in runs), strict=True)]
        (line,) = left.plot(visits, [m.mean for m in means], "o-", label=arm, linewidth=1.3, markersize=4)
        low, high = ([m.mean + sign * m.half for m in means] for sign in (-1, 1))
        left.fill_between(visits, low, high, alpha=0.1, color=line.get_color(), linewidth=0)
    left.set(xlabel="visits of questions", ylabel="VQA accuracy, percent: mean and 95% interval")
    left.legend(fontsize=8)
    losses = {arm: [run.expected_loss for run in runs] for arm, runs in results.items()}
    draw_seeds(right, losses, "expected loss, nats a token: mean, 95% interval, and each seed")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main(argv: Sequence[str]) -> None:
    parser = study_parser(NAME, __doc__, "answers.md")
    parser.add_argument("--steps", type=int, default=120, help="whose gradients are compared; default: 120")
    arguments = parse(parser, argv)
    if arguments.steps < 2:
        raise ValueError(f"--steps {arguments.steps}: expected at least 2, of which there is a variance")
    study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """Train, measure, and write."""
    overrides: Sequence[str] = arguments.overrides
    configs = {arm: CONFIGS / f"{arm}.yaml" for arm in ARMS}
    jobs: dict[str, list[Job]] = {
        arm: [Job(config, seed, arguments.runs / arm / f"seed{seed}") for seed in arguments.seeds]
        for arm, config in configs.items()
    }
    by_seed = [job for together in zip(*jobs.values(), strict=True) for job in together]
    train_all(by_seed, arguments.workers, overrides)
    results = {arm: [measured(job, overrides) for job in of_arm] for arm, of_arm in jobs.items()}
    costs: dict[str, Cost] = {arm: cost_of(load_config(config, overrides)) for arm, config in configs.items()}
    variances = gradient_variances(jobs[REFERENCE][0], overrides, arguments.steps)
    write_table(arguments.document, BEGIN, lines := table(costs, results, variances))
    plot(arguments.plot, results)
    show("\n".join(lines), f"written into {arguments.document}, beside {arguments.plot}")


if __name__ == "__main__":
    cli.run(main)
