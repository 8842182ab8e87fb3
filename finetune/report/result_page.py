"""The report of a finished run, to be shared: OUTPUT/report.json and report.md.

Sources: the run's configuration, result.json, metrics.jsonl, and the answers in eval/. The report contains no absolute
path, no name of a person or a machine, and no secret.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.records import decodable
from data.text_rows import names_image
from finetune.config.schema import SPLITS, RunConfig
from finetune.config.source import SOURCE_PATHS
from finetune.config.stages import stage_output
from finetune.config.strict_yaml import dump
from finetune.evaluation.answer import texts_alone
from finetune.evaluation.run import task_of
from finetune.evaluation.score import Score
from finetune.evaluation.vqa_accuracy import read_results
from finetune.preflight.plan import GIB
from finetune.report.markdown import fenced, plain
from finetune.report.run_data import read_lines
from finetune.system.device import pick_device
from finetune.training.commits import at_commits
from finetune.training.examples import open_records, skipped_records
from finetune.training.result import Result

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes")
PATHS = {"path", *SOURCE_PATHS, "start_from", "reference", "output"}  # keys whose values are paths


def write_report(config: RunConfig) -> Path:
    """Write both files, and return their directory."""
    config = at_commits(config)
    output = Path(config.output)
    report = {
        "metric": task_of(config).metric,
        "unit": task_of(config).unit,
        "scores": scores_of(config),
        "training": training_of(output) | {"stages": stages_of(config)},
        "data": data_of(config),
        "environment": environment_of(pick_device(config.model.device)),
        "configuration": public(config),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "report.md").write_text(markdown(report), encoding="utf-8")
    return output


def scores_of(config: RunConfig) -> dict[str, Any]:
    """Accuracy and its 95% confidence interval for each evaluated arm: of all questions, and by answer type."""
    assert config.data.validation is not None, "the run was evaluated"
    skipped = skipped_records(config, "validation")
    records = decodable(open_records(config, "validation", skipped), skipped).remove_columns("image")
    types = sorted({record["answer_type"] for record in records} - {""})
    by_type = {name: [record for record in records if record["answer_type"] == name] for name in types}
    task, scores = task_of(config), dict[str, Any]()
    for arm in ("base", "adapter", "merged"):
        file = Path(config.output) / "eval" / arm / "results.json"
        if not file.exists():
            continue
        answers = texts_alone(read_results(file))
        whole = task.score(answers, records)
        scores[arm] = figures_of(whole) | {
            "by_answer_type": {
                name: figures_of(task.score({record["id"]: answers[record["id"]] for record in some}, some))
                for name, some in by_type.items()
                if name in whole.by_answer_type  # not every task tells them apart
            }
        }
    return scores


def figures_of(scored: Score) -> dict[str, Any]:
    low, high = scored.interval
    return {
        "score": round(scored.overall, 2),
        "interval": [round(low, 2), round(high, 2)],
        "questions": scored.questions,
    }


def training_of(output: Path) -> dict[str, Any]:
    """Steps and time of training, those before interruptions included, and the step whose adapter was kept."""
    trained = {"steps": 0, "hours": 0.0} | last_line(output)
    kept = Result.read(output) or Result(trained["steps"], "not known")
    return {
        **trained,
        "kept_step": kept.step,
        "kept_for": kept.why,
        "score_at_kept_step": kept.metric_value,
        "validation_loss_at_kept_step": kept.validation_loss,
    }


def stages_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Steps and time of each stage before the run, by name."""
    return {stage.name: last_line(Path(stage_output(config, stage))) for stage in config.stages}


def last_line(output: Path) -> dict[str, Any]:
    """Steps and hours of a run so far; empty where nothing was logged."""
    lines = read_lines(output / "metrics.jsonl")
    return {"steps": lines[-1]["step"], "hours": round(lines[-1]["seconds"] / 3600, 3)} if lines else {}


def data_of(config: RunConfig) -> dict[str, dict[str, int]]:
    """The number of questions and of images."""
    sizes = {}
    for name in ("train", "validation"):
        if getattr(config.data, name) is not None:
            records = open_records(config, name)
            sizes[name] = {"questions": len(records), "images": sum(map(names_image, set(records["image_id"][:])))}
    return sizes


def environment_of(device: torch.device) -> dict[str, Any]:
    """The device, its driver, and the versions of the packages that the numbers depend on."""
    found: dict[str, Any] = {"device": device.type, "system": platform.system(), "python": platform.python_version()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        found |= {"device": card.name, "memory_gib": round(card.total_memory / GIB, 2)}
        found |= {"driver": driver.splitlines()[0] if driver else None, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"commit": output_of(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])}


def output_of(command: Sequence[str]) -> str | None:
    """What a program prints; None if it is not installed, or fails."""
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() or None


def public(config: RunConfig) -> dict[str, Any]:
    """The configuration without tracking and without what sources leave open, and with shortened paths."""
    output = os.path.abspath(config.output)

    def shown(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: shown(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [shown(inner, key) for inner in value]
        return shortened(value, output) if key in PATHS and value is not None else value

    found: dict[str, Any] = shown(config.model_dump(mode="json", exclude={"tracking"}))
    found["data"] |= {split: given_alone(found["data"][split]) for split in SPLITS}
    return found


def given_alone(sources: Any) -> Any:
    """One or several sources without the keys that are null: most of them are of other kinds."""
    if isinstance(sources, list):
        return list(map(given_alone, sources))
    return {key: value for key, value in sources.items() if value is not None} if isinstance(sources, dict) else sources


def shortened(path: str, output: str) -> str:
    """Relative to the run or to the working directory, if below it; elsewhere the last component only. Hub ids stay."""
    absolute = Path(os.path.abspath(path))
    for above in (Path(output), Path.cwd()):
        if above in absolute.parents and (above.name or not Path(path).is_absolute()):  # below / the whole path is told
            return absolute.relative_to(above).as_posix()
    return absolute.name


def markdown(report: dict[str, Any]) -> str:
    """The report as a page of Markdown."""
    scores, training = report["scores"], report["training"]
    types = list(next(iter(scores.values()))["by_answer_type"]) if scores else []
    rows = [
        [f"{report['metric']}, {report['unit']}", "all", *map(plain, types), "questions"],
        ["---"] * (3 + len(types)),
    ]
    for arm, found in scores.items():
        cells = [found, *(found["by_answer_type"][name] for name in types)]
        rows.append([arm, *map(cell, cells), f"{found['questions']:,}"])
    lines = ["# Result", "", *(f"| {' | '.join(row)} |" for row in rows), "", "With 95% confidence intervals.", ""]
    lines += [f"{training['steps']:,} steps in {training['hours']:.2f} hours; kept: step {training['kept_step']:,} "]
    lines[-1] += f"({training['kept_for']})\n"
    for name, stage in training["stages"].items():
        lines.append(f"- stage {name} before it: {stage.get('steps', 0):,} steps in {stage.get('hours', 0):.2f} hours")
    for name, size in report["data"].items():
        about = f"about {size['images']:,} images" if size["images"] else "without images"
        lines.append(f"- {name}: {size['questions']:,} questions {about}")
    lines += [f"- {name}: {value}" for name, value in report["environment"].items() if value is not None]
    return "\n".join([*lines, "", fenced("yaml", dump(report["configuration"])), ""])


def cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['score']:.2f} ({low:.2f} to {high:.2f})"
