"""What a run keeps as its result: the weights of which step, and by which figure they were chosen.

The best step is the one with the best metric. Where the metric ties, as it does at 0 on long answers, it is the one
with the lower validation loss, and where that ties too, the later one. Not here: how the metric is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.adapters.metadata import TrainingFacts
from finetune.system.atomic import text_to_be

RESULT_FILE, BEST_FILE = "result.json", "best.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """The step whose weights are kept, and why; figures are None where nothing was evaluated, or not finite."""

    step: int
    why: str
    metric: str | None = None
    metric_value: float | None = None
    validation_loss: float | None = None
    finished: bool = False
    """Whether the run went to its end, so that no later step can be better."""
    better_since: int | None = None
    """The first step whose figures are these, which are better than all before; None: this one."""
    stopped_at: int | None = None
    """The step after which a finished run stopped early (`train.patience`)."""

    def __str__(self) -> str:
        figures = {self.metric: self.metric_value, "validation loss": self.validation_loss}
        said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)
        return f"step {self.step}" + (f", {said}" if said else "") + f" ({self.why})"

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better; an unknown figure is worse than any."""
        metric = -math.inf if self.metric_value is None else self.metric_value
        return metric, -math.inf if self.validation_loss is None else -self.validation_loss

    @property
    def facts(self) -> TrainingFacts:
        """What an adapter's own metadata says of this."""
        return TrainingFacts(self.step, self.metric, self.metric_value, self.validation_loss)

    @contextlib.contextmanager
    def written(self, output: Path) -> Iterator[None]:
        """Write OUTPUT/result.json, once the weights were saved within this context; otherwise it is as it was.

        Raises:
            OSError: the disk has no room for it.
        """
        with text_to_be(output / RESULT_FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n"):
            yield

    @classmethod
    def read(cls, output: Path) -> Result | None:
        """What OUTPUT/result.json says; None where there is none, or it cannot be read."""
        try:
            return cls(**json.loads((output / RESULT_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @classmethod
    def finish(cls, output: Path, stopped_at: int | None = None) -> None:
        """Note that the run went to its end, or stopped early after a step. Where that finds no room, it is taken for
        one that did not.
        """
        if result := cls.read(output):
            ended = dataclasses.replace(result, finished=True, stopped_at=stopped_at)
            with contextlib.suppress(OSError), ended.written(output):
                pass

    @classmethod
    def reopen(cls, output: Path) -> None:
        """Note that a run which went to its end goes on. ValueError where that finds no room."""
        if (result := cls.read(output)) is None or not result.finished:
            return
        try:
            with dataclasses.replace(result, finished=False, stopped_at=None).written(output):
                pass
        except OSError as error:
            raise ValueError(f"{output / RESULT_FILE} cannot be written: {error}; make room and start again") from error


@dataclasses.dataclass(frozen=True)
class Best:
    """The best result so far, as a checkpoint stores it, and what it was judged by: figures of other questions, or of
    other answers to them, do not compare.
    """

    result: Result | None
    judged_by: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, checkpoint: Path, judged_by: dict[str, Any]) -> Best:
        """That of a checkpoint; none so far where it was judged by something else, or the checkpoint has none."""
        try:
            stored = json.loads((checkpoint / BEST_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            stored = {}
        comparable = stored.get("judged_by") == judged_by and stored.get("result")
        return cls(Result(**stored["result"]) if comparable else None, judged_by)


def judge(step: int, metrics: Mapping[str, float], metric: str, best: Result | None) -> Result | None:
    """The result that a step's metrics make it, or None: `best` so far is better.

    metrics: `metric`, of which more is better, and perhaps `loss`.
    """
    made = Result(step, f"best {metric}", metric, finite(metrics[metric]), finite(metrics.get("loss")))
    if best is None or best.metric != metric:  # chosen by another figure, which does not compare
        return made
    if made.rank < best.rank:
        return None
    if made.rank == best.rank:
        why, since = f"{metric} and validation loss as at step {best.step}, and later", best.better_since or best.step
        return dataclasses.replace(made, why=why, better_since=since)
    if made.metric_value == best.metric_value:
        return dataclasses.replace(made, why=f"{metric} as at step {best.step}, and a lower validation loss")
    return made


def last_step(step: int) -> Result:
    """The result of a run that evaluates nothing."""
    return Result(step, "last step, nothing was evaluated")


def finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
