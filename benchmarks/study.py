"""What studies of several arms with several seeds share: runs of train.py, intervals over seeds, a table in a document.

A run is `train.py CONFIG train.seed=SEED`, in a process of its own with one thread. Runs that are finished are not
repeated, one that was interrupted resumes. An interval is the mean over the seeds plus or minus t standard errors, t of
Student's distribution: where the mean of further seeds is to be expected, on the same questions.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.system.atomic import write_text_whole
from finetune.system.console import show
from finetune.system.paths import path_argument
from finetune.training.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
END = "<!-- end -->"
# The 0.975 quantile of Student's t, by degrees of freedom (one less than there are seeds).
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run: of an arm's configuration, with a seed, into a directory."""

    config: Path
    seed: int
    output: Path

    @property
    def arm(self) -> str:
        return self.config.stem

    @property
    def changes(self) -> list[str]:
        """What is laid over the configuration."""
        return [f"train.seed={self.seed}", f"output={self.output}"]

    @property
    def finished(self) -> bool:
        result = Result.read(self.output)
        return result is not None and result.finished


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the width of its 95% interval."""

    mean: float
    half: float

    def __format__(self, spec: str) -> str:
        """spec: of the mean, such as "+.2f"; by default ".1f"."""
        spec = spec or ".1f"
        return f"{self.mean:{spec}} ± {self.half:{spec.removeprefix('+')}}"


def interval(values: Sequence[float]) -> Interval:
    """Of independent, normally distributed values: mean ± t * standard deviation / sqrt(n).

    Raises:
        ValueError: fewer than two values, or more than the table of t goes to.
    """
    if len(values) - 1 not in T_975:
        raise ValueError(f"{len(values)} values: an interval is known for 2 to {len(T_975) + 1} seeds")
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.mean(values), T_975[len(values) - 1] * error)


def train_all(jobs: Sequence[Job], workers: int, overrides: Sequence[str]) -> None:
    """Train what is not finished, `workers` runs at a time. Where one fails, none is begun after it.

    Raises:
        ValueError: a run failed; says where its output is.
    """
    left = [job for job in jobs if not job.finished]
    failed = threading.Event()

    def train_unless_failed(job: Job) -> None:
        if failed.is_set():
            return
        try:
            train_one(job, overrides)
        except ValueError:
            failed.set()
            raise

    show(f"{len(jobs) - len(left)} of {len(jobs)} runs are finished; {len(left)} are left, {workers} at a time")
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(train_unless_failed, job) for job in left]:
            done.result()


def train_one(job: Job, overrides: Sequence[str]) -> None:
    """Train one run to its end; what it prints goes to OUTPUT.log."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    log = job.output.with_suffix(".log")
    command = [sys.executable, str(ROOT / "train.py"), str(job.config), *overrides, *job.changes]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **threads})
    if status.returncode:
        raise ValueError(f"{job.arm}, seed {job.seed}: train.py ended with {status.returncode}; see {log}")
    show(f"{job.arm}, seed {job.seed}: {Result.read(job.output)}")


def study_parser(module: str, description: str | None, document: str, seeds: int = 5) -> argparse.ArgumentParser:
    """The options that all studies have, read by `parse`.

    document: in docs, with the table, and seeds: how many, by default. Runs and plot are called as the module is.
    """
    name, numbers = module.rpartition(".")[2], list(range(1, seeds + 1))
    made = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("overrides", metavar="section.key=value", nargs="*", help="laid over every configuration")
    said = " ".join(map(str, numbers))
    made.add_argument("--seeds", nargs="+", type=int, default=numbers, help=f"default: {said}")
    made.add_argument("--workers", type=int, default=2, help="runs at a time, each with one thread; default: 2")
    made.add_argument("--runs", type=path_argument, default=ROOT / "runs" / name, help="directory of all runs")
    made.add_argument("--document", type=path_argument, default=ROOT / "docs" / document, help="with the table")
    made.add_argument("--plot", type=path_argument, default=ROOT / "docs" / f"{name}.png", help="file of the plot")
    return made


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options. ValueError where the seeds are not several different ones, of which there is an interval."""
    arguments = parser.parse_intermixed_args(argv)
    if not 2 <= len(set(arguments.seeds)) == len(arguments.seeds) <= len(T_975) + 1:
        raise ValueError(f"--seeds {arguments.seeds}: expected 2 to {len(T_975) + 1} different ones")
    return arguments


def by_type(line: dict[str, float]) -> dict[str, float]:
    """Accuracy by answer type, of an evaluation's line."""
    prefix = "eval_accuracy_"
    return {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}


def differences(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """By how much an arm's figures are above another arm's, seed by seed."""
    return [value - other for value, other in zip(values, others, strict=True)]


def begin_mark(module: str) -> str:
    """What stands in a document before the table that a module writes; END stands after it."""
    return f"<!-- begin: written by python -m {module} -->"


def write_table(document: Path, begin: str, lines: Sequence[str]) -> None:
    """Put a table between the two marks of a document.

    Raises:
        ValueError: it has no such marks.
    """
    text = document.read_text(encoding="utf-8")
    if text.count(begin) != 1 or END not in text.split(begin)[-1]:
        raise ValueError(f"{document} has no place for the table: expected one line {begin!r}, and {END!r} below it")
    head, rest = text.split(begin)
    tail = rest.split(END, 1)[1]
    write_text_whole(document, f"{head}{begin}\n\n" + "\n".join(lines) + f"\n\n{END}{tail}")


def draw_seeds(axes: Axes, values: Mapping[str, Sequence[float]], label: str) -> None:
    """Of each arm a point for each seed, and the mean with its 95% interval."""
    for height, of_seeds in enumerate(values.values()):
        mean = interval(of_seeds)
        axes.errorbar(mean.mean, height, xerr=mean.half, fmt="o", capsize=4, color=f"C{height}")
        axes.plot(of_seeds, [height + 0.2] * len(of_seeds), ".", color=f"C{height}", alpha=0.5, markersize=5)
    axes.set(xlabel=label, yticks=range(len(values)))
    axes.set_yticklabels(list(values))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
