"""What a run left in its directory, read for a report: configuration, metrics, result, and the answers of each arm."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune.config.load import load_config
from finetune.config.schema import RunConfig
from finetune.evaluation.evaluate import ANSWERS_FILE, METRICS_FILE
from finetune.evaluation.inputs import INPUTS_KEY
from finetune.evaluation.score import PERCENT
from finetune.training.result import Result

ARMS = ("base", "adapter", "model", "merged")
TRAINED = ("adapter", "model")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One network's figures (`metrics.json`) and answers (`answers.jsonl`, by id); answers may be empty."""

    name: str
    metrics: dict[str, Any]
    answers: dict[str, dict[str, Any]]

    @property
    def metric(self) -> str:
        """What it is judged by, in words."""
        return str(self.metrics.get("metric", "VQA accuracy"))

    @property
    def unit(self) -> str:
        """Of its score."""
        return str(self.metrics.get("unit", PERCENT))

    @property
    def task(self) -> str:
        """What its answers were judged by, by name; "" where its figures do not say."""
        return str(self.metrics.get("task", ""))

    @property
    def by_label(self) -> dict[str, float]:
        """A further metric of each label, in percent; empty where answers have none."""
        return dict(self.metrics.get("by_label", {}))

    @property
    def by_source(self) -> dict[str, Arm]:
        """The figures of each source, where the questions are of several."""
        return {name: Arm(self.name, found, {}) for name, found in self.metrics.get("by_source", {}).items()}

    @property
    def interval(self) -> tuple[float, float]:
        low, high = self.metrics["interval"]
        return float(low), float(high)

    @property
    def confusions(self) -> list[tuple[str, int, list[tuple[str, int]]]]:
        """The most frequent expected answers: how often each is expected, and what was answered wrongly instead."""
        expected: Counter[str] = Counter()
        wrong: dict[str, Counter[str]] = {}
        for line in self.answers.values():
            right = Counter(line["expected"]).most_common(1)[0][0]
            expected[right] += 1
            if line["score"] < 50:
                wrong.setdefault(right, Counter())[line["answer"]] += 1
        return [(text, count, wrong.get(text, Counter()).most_common(4)) for text, count in expected.most_common(12)]


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run's directory.

    Attributes:
        lines: of metrics.jsonl, in the order of their steps; of a step that was trained again after an interruption the
            later ones.
    """

    directory: Path
    config: RunConfig
    lines: list[dict[str, Any]]
    result: Result | None
    arms: dict[str, Arm]

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def trained(self) -> Arm | None:
        """The arm of what was trained, if it was evaluated."""
        return next((self.arms[name] for name in TRAINED if name in self.arms), None)

    def base_beside(self, arm: Arm) -> Arm | None:
        """The arm of the base, if it was evaluated on the same questions as `arm`."""
        base = self.arms.get("base")
        return base if base and base.metrics.get(INPUTS_KEY) == arm.metrics.get(INPUTS_KEY) else None

    def is_outdated(self, arm: Arm) -> bool:
        """Whether the weights of an arm were written after it was evaluated."""
        evaluated = (self.directory / "eval" / arm.name / METRICS_FILE).stat().st_mtime
        return any(file.stat().st_mtime > evaluated for file in (self.directory / arm.name).glob("*.safetensors"))

    @property
    def duration(self) -> str | None:
        """How long it has trained so far, in hours or minutes; None where nothing was logged."""
        if not self.lines:
            return None
        seconds = self.lines[-1]["seconds"]
        return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"

    @property
    def most_memory(self) -> float | None:
        """The most GiB that were in use; None where that was not logged."""
        return max(self.series("memory_gib")[1], default=None)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps at which a figure was logged, and its values."""
        found = [(line["step"], line[key]) for line in self.lines if isinstance(line.get(key), int | float)]
        return [step for step, _ in found], [float(value) for _, value in found]

    @property
    def speed(self) -> tuple[list[int], list[float]]:
        """Examples a second between the lines that log a loss, evaluations on the way included."""
        logged = [line for line in self.lines if "loss" in line]
        size = self.config.train.batch_size
        pairs = [
            (now["step"], size * (now["step"] - before["step"]) / (now["seconds"] - before["seconds"]))
            for before, now in pairwise(logged)
            if now["seconds"] > before["seconds"]
        ]
        return [step for step, _ in pairs], [rate for _, rate in pairs]


def read_run(directory: Path) -> RunData:
    """Read a run's directory.

    Raises:
        ValueError: it is not the directory of a run, or a file in it cannot be read.
    """
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"{directory} holds no config.yaml: expected the directory of a run, such as runs/quickstart")
    arms = {name: arm for name in ARMS if (arm := read_arm(directory / "eval" / name)) is not None}
    lines = read_lines(directory / "metrics.jsonl")
    return RunData(directory, load_config(directory / "config.yaml"), latest(lines), Result.read(directory), arms)


def read_arm(directory: Path) -> Arm | None:
    """What was evaluated there; None where nothing was."""
    file = directory / METRICS_FILE
    if not file.is_file():
        return None
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        answers = {line["id"]: line for line in read_lines(directory / ANSWERS_FILE)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} cannot be read: {error}; evaluate the run again") from error
    return Arm(directory.name, metrics, answers)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines; none where there is no file.

    Raises:
        ValueError: a line is no JSON; names it.
    """
    if not file.is_file():
        return []
    found = []
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+2028 within an answer
        for number, text in enumerate(lines, start=1):
            try:
                found.append(json.loads(text))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}, is no JSON ({error}): delete that line") from error
    return found


def latest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines by step, without those that a resumed run trained again: it goes back to its checkpoint, and they are
    followed by lines of earlier steps.
    """
    kept: list[dict[str, Any]] = []
    for line in lines:
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        kept.append(line)
    return kept
