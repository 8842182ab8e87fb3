"""The report of a run, or of several beside each other: one HTML file that needs nothing from outside.

Every text of the data and of the networks is escaped by the template; charts are SVG, images are embedded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from data.invalid import SkippedRecords
from data.records import ImagesById
from finetune.config.schema import RunConfig
from finetune.config.strict_yaml import dump
from finetune.evaluation.calibration import ECE, calibration_bins
from finetune.evaluation.mixture import MixtureTask
from finetune.evaluation.score import PERCENT
from finetune.evaluation.tasks import TASKS
from finetune.lora.linear import adapter_table, inject_lora
from finetune.report import charts
from finetune.report.gallery import WIDTH, Card, cards_of, names_of_boxes, short
from finetune.report.labels import MOST_FIGURES, confusion_matrix, figures_by_label
from finetune.report.result_page import environment_of, public
from finetune.report.run_data import TRAINED, Arm, RunData, read_run
from finetune.report.summary import summary
from finetune.system.atomic import write_text_whole
from finetune.system.console import show
from finetune.system.device import pick_device
from finetune.training.examples import network_config, open_records
from finetune.training.resume import flat
from model import PaliGemma, fetch

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
CURVES = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    **{f"eval_{task.key}": f"validation {task.key}, {task.unit}" for task in TASKS.values()},
    f"eval_{MixtureTask.key}": "validation, geometric mean of the metrics of all sources",
    "eval_pair_accuracy": "validation pairs whose chosen answer gained more, percent",
    "margin": "margin of the training pairs",
    "eval_margin": "margin of the validation pairs",
    "eval_reward_chosen": "reward of chosen answers, validation",
    "eval_reward_rejected": "reward of rejected answers, validation",
    "eval_kl": "divergence from the reference, nats per token",
    "reward": "what the network's own answers are worth, 0 to 1",
    "kl": "gain of its own answers over the reference, nats per token",
    "same_reward": "training examples whose answers are all worth the same, percent",
    "sample_tokens": "tokens of its own answers",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradients",
    "memory_gib": "memory, GiB",
}


def write_page(directory: Path) -> Path:
    """Write the report of a run into its directory; returns the file.

    Raises:
        ValueError: it is no run, or what it left cannot be read.
    """
    run = read_run(directory)
    page = render("run.html", **of_run(run))
    write_text_whole(directory / REPORT_FILE, page)
    return directory / REPORT_FILE


def show_page(directory: Path) -> None:
    """Write the report of a run and say where it is. What was trained and evaluated stands, whatever happens here."""
    try:
        show(f"report: {write_page(directory)}")
    except Exception as error:  # of any kind: a night of training is worth more than its report
        show(f"the report could not be written ({type(error).__name__}: {error})")


def write_comparison(directories: Sequence[Path], output: Path) -> Path:
    """Write a page that shows several runs beside each other; returns the file.

    Raises:
        ValueError: one of them is no run, or two have the same name.
    """
    runs = {run.name: run for run in map(read_run, directories)}
    if len(runs) < len(directories):
        raise ValueError(f"runs of the same name cannot be told apart: {', '.join(map(str, directories))}")
    write_text_whole(output, render("compare.html", **of_several(runs)))
    return output


def render(template: str, **values: Any) -> str:
    """A page from a template; what is not Markup is escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = lambda value: f"{value:.2f}"
    environment.filters["short"], environment.filters["names_of_boxes"] = short, names_of_boxes
    environment.globals |= {"layer_width": WIDTH, "most_labels": MOST_FIGURES}
    return environment.get_template(template).render(values)


def of_run(run: RunData) -> dict[str, Any]:
    """What the template of one run shows."""
    scores = scores_chart(run.arms)
    return {
        "title": run.name,
        "summary": summary(run),
        "scores": scores,
        "arms": run.arms,
        "sources": sources(run.arms),
        "by_type": by_type_chart(run.arms),
        "question_types": question_types(run.arms),
        "reliability": reliability_chart(run.arms),
        "curves": curves_of({run.name: run}),
        "cards": cards(run),
        "confusions": confusions(run.trained),
        "matrix": confusion_matrix(run.trained) if run.trained else None,
        "labels": figures_by_label(run.arms),
        "label_metric": next((arm.metrics.get("label_metric", "") for arm in run.arms.values()), ""),
        "adapted": adapted(run),
        "facts": facts(run),
        "configuration": dump(public(run.config)),
        "environment": {k: v for k, v in environment_of(pick_device("auto")).items() if v is not None},
    }


def of_several(runs: dict[str, RunData]) -> dict[str, Any]:
    """What the template of a comparison shows."""
    first, *others = runs.values()
    trained = {name: run.trained for name, run in runs.items() if run.trained}
    return {
        "title": " and ".join(runs),
        "first": first.name,
        "changed": {run.name: differences(first.config, run.config) for run in others},
        "scores": scores_chart(trained),
        "by_type": by_type_chart(trained),
        "curves": curves_of(runs),
        "cards": differing(first, trained, {name: aspect_of(run) for name, run in runs.items()}),
        "facts": (found := {name: facts(run) for name, run in runs.items()}),
        "rows": list(dict.fromkeys(key for of_one in found.values() for key in of_one)),
    }


def differences(first: RunConfig, other: RunConfig) -> list[str]:
    """Keys whose values differ, as lines to show; paths are shortened, and output and tracking are left out."""
    before, now = (flat(config.model_dump(mode="json")) for config in (first, other))
    was, is_now = (flat(public(config)) for config in (first, other))
    return [
        f"{key}: was {was.get(key, '(absent)')}, is {is_now.get(key, '(absent)')}"
        for key in dict.fromkeys([*was, *is_now])
        if key != "output" and before.get(key, "(absent)") != now.get(key, "(absent)")
    ]


def metric_of(arms: dict[str, Arm]) -> str:
    """What arms are judged by, in words, and its unit."""
    return " or ".join(dict.fromkeys(f"{arm.metric}, {arm.unit}" for arm in arms.values()))


def highest_of(arms: dict[str, Arm]) -> float | None:
    """What the metric of arms can reach, where that is 100 percent; else None."""
    return 100 if all(arm.unit == PERCENT for arm in arms.values()) else None


def confusions(arm: Arm | None) -> list[tuple[str, int, list[tuple[str, int]]]]:
    """The most frequent answers and what was answered instead; none where each answer is its own, and where the matrix
    says it.
    """
    return arm.confusions if arm and arm.task not in ("classify", "detect", "caption") else []


def scores_chart(arms: dict[str, Arm]) -> Markup | None:
    """The scores as bars; none of several sources, whose mean says nothing by itself."""
    if not arms or any(arm.by_source for arm in arms.values()):
        return None
    overall = {name: arm.metrics["overall"] for name, arm in arms.items()}
    intervals = {name: arm.interval for name, arm in arms.items()}
    return Markup(charts.bars({"": overall}, intervals, f"{metric_of(arms)}, with 95% intervals", highest_of(arms)))


def sources(arms: dict[str, Arm]) -> list[tuple[str, str, int, dict[str, Arm]]]:
    """Of each source its name, metric with unit, questions, and the figures of each arm; none where there is one."""
    named = dict.fromkeys(name for arm in arms.values() for name in arm.by_source)
    found = {name: {arm: of.by_source[name] for arm, of in arms.items() if name in of.by_source} for name in named}
    return [
        (name, metric_of(of_source), next(iter(of_source.values())).metrics["questions"], of_source)
        for name, of_source in found.items()
    ]


def by_type_chart(arms: dict[str, Arm]) -> Markup | None:
    accuracies = {name: arm.metrics["by_answer_type"] for name, arm in arms.items()}
    types = sorted({kind for by_type in accuracies.values() for kind in by_type})
    if not types:
        return None
    groups = {kind: {arm: by_type[kind] for arm, by_type in accuracies.items() if kind in by_type} for kind in types}
    return Markup(charts.bars(groups, {}, metric_of(arms), highest_of(arms)))


def reliability_chart(arms: dict[str, Arm]) -> Markup | None:
    """Accuracy by confidence, of the arms whose calibration was measured."""
    bins = {}
    for name, arm in arms.items():
        if ECE in arm.metrics.get("others", {}) and arm.answers:
            pairs = [(line["confidence"], line["score"] / 100) for line in arm.answers.values()]
            bins[name] = calibration_bins(*map(list, zip(*pairs, strict=True)))
    return Markup(charts.reliability(bins, metric_of({name: arms[name] for name in bins}))) if bins else None


def question_types(arms: dict[str, Arm]) -> list[tuple[str, int, dict[str, float]]]:
    """The most frequent question types: how many questions, and the accuracy of each arm."""
    if not arms:
        return []
    counts = next(iter(arms.values())).metrics["counts"]["question_type"]
    ordered = sorted(counts, key=lambda name: -counts[name])[:20]
    return [
        (name, counts[name], {arm: found.metrics["by_question_type"].get(name, 0.0) for arm, found in arms.items()})
        for name in ordered
    ]


def curves_of(runs: dict[str, RunData]) -> list[Markup]:
    """A chart of every figure that was logged more than once."""
    found = []
    names = {source.called for run in runs.values() for source in run.config.data.sources("validation")}
    of_sources = {
        f"eval_{name}_{task.key}": f"{name}: validation {task.key}, {task.unit}"
        for name in sorted(names)
        for task in TASKS.values()
    }
    for key, label in (CURVES | of_sources).items():
        series = {name: data for name, run in runs.items() if len((data := run.series(key))[0]) > 1}
        if series:
            found.append(Markup(charts.curves(series, label)))
    speeds = {name: data for name, run in runs.items() if len((data := run.speed)[0]) > 1}
    return [*found, *([Markup(charts.curves(speeds, "examples a second"))] if speeds else [])]


def cards(run: RunData) -> list[Card]:
    """The gallery: base and trained network side by side; none where the images are no longer there."""
    arms = {name: run.arms[name] for name in ("base", *TRAINED) if name in run.arms and run.arms[name].answers}
    return cards_of(arms, images(run), dict.fromkeys(arms, aspect_of(run))) if arms else []


def aspect_of(run: RunData) -> str:
    """How its network makes images square, as far as locations depend on it."""
    return run.config.image.aspect or "squash"


def images(run: RunData) -> Mapping[str, Any]:
    """The images of the validation records, by id; none where the run names no such records, or they are gone."""
    if run.config.data.validation is None:
        return {}
    try:
        records = open_records(run.config, "validation", SkippedRecords(share=1.0))
    except ValueError:
        return {}
    return ImagesById(records)


def differing(first: RunData, arms: dict[str, Arm], aspects: dict[str, str]) -> list[Card]:
    """Images of questions that one run answers and another does not."""
    if len(arms) < 2:
        return []
    shared = set.intersection(*(set(arm.answers) for arm in arms.values()))
    told_apart = {name for name in shared if len({arm.answers[name]["score"] >= 50 for arm in arms.values()}) > 1}
    some = {
        name: Arm(arm.name, arm.metrics, {key: line for key, line in arm.answers.items() if key in told_apart})
        for name, arm in arms.items()
    }
    return cards_of(some, images(first), aspects) if told_apart else []


def adapted(run: RunData) -> list[tuple[str, str, int, int, int]]:
    """What was trained, per tower, from dimensions alone; nothing where the checkpoint is no longer there."""
    if run.config.lora is None:
        return []
    try:
        directory = fetch(run.config.model.path, run.config.model.revision, weights=False)
        dimensions = network_config(directory, run.config)
    except ValueError:
        return []
    with torch.device("meta"):
        model = PaliGemma(dimensions)
    inject_lora(model, run.config.lora)
    return adapter_table(model)


def facts(run: RunData) -> dict[str, str]:
    """Steps, time and memory, in words."""
    found: dict[str, str] = {}
    if run.duration:
        found |= {"steps": f"{run.lines[-1]['step']:,}", "time": run.duration}
    if run.most_memory is not None:
        found["most memory"] = f"{run.most_memory:.2f} GiB"
    if run.result:
        found["kept"] = str(run.result)
    for name in run.trained.metrics.get("others", {}) if run.trained else ():
        by_arm = ((arm.name, arm.metrics.get("others", {}).get(name)) for arm in run.arms.values())
        found[f"{name}, percent"] = ", ".join(f"{arm} {value:.2f}" for arm, value in by_arm if value is not None)
    return found
