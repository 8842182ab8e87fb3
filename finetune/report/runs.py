"""`paligemma-lora runs [DIR ...]`: the runs of a directory as a table, and what differs in their configurations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import cli
from finetune.system.paths import path_argument

if TYPE_CHECKING:
    from rich.table import Table

    from finetune.report.run_data import RunData


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"{cli.CONSOLE} runs", description=__doc__)
    parser.add_argument(
        "directories",
        metavar="DIR",
        nargs="*",
        type=path_argument,
        default=[Path("runs")],
        help="a directory of runs, or a run (default: runs)",
    )
    directories = parser.parse_args(argv).directories

    # Only now: --help does without torch, whose import takes seconds.
    from finetune.system.console import show

    runs, unreadable = read_runs(directories)
    if not (runs or unreadable):
        raise ValueError(f"no run in {', '.join(map(str, directories))}: expected directories with a config.yaml")
    if runs:
        show(table_of(runs))
    if differing := differences_of(runs):
        show(table_of_differences(differing))
    for directory, reason in unreadable.items():
        show(f"{directory} cannot be read: {reason}")


def read_runs(directories: Sequence[Path]) -> tuple[dict[str, RunData], dict[Path, str]]:
    """The runs by name, by path where a name occurs twice; and why others cannot be read.

    Raises:
        ValueError: a directory does not exist.
    """
    from finetune.report.run_data import read_run

    found: list[RunData] = []
    unreadable: dict[Path, str] = {}
    for directory in runs_in(directories):
        try:
            found.append(read_run(directory))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            unreadable[directory] = " ".join(str(error).split()) or type(error).__name__
    names = [run.name for run in found]
    return {run.name if names.count(run.name) == 1 else str(run.directory): run for run in found}, unreadable


def runs_in(directories: Sequence[Path]) -> list[Path]:
    """Directories of runs: those given, and those right below them."""
    found: list[Path] = []
    for directory in directories:
        if not directory.is_dir():
            raise ValueError(f"{directory} does not exist; expected a directory of runs, or a run")
        candidates = [directory] if (directory / "config.yaml").is_file() else sorted(directory.iterdir())
        found += [path for path in candidates if (path / "config.yaml").is_file()]
    return list(dict.fromkeys(found))


def table_of(runs: dict[str, RunData]) -> Table:
    from finetune.system.console import new_table

    table = new_table("run", "best", "at step", "score", "time", "GiB", "state")
    for name, run in runs.items():
        memory = "" if run.most_memory is None else f"{run.most_memory:.2f}"
        table.add_row(name, *best_of(run), score_of(run), run.duration or "", memory, state_of(run))
    table.caption = "best: in training, by which the step was chosen; score: of evaluate.py; GiB: the most in use"
    return table


def best_of(run: RunData) -> tuple[str, str]:
    """The figure that the kept step was chosen by, and that step."""
    result = run.result
    if result is None:
        return "", ""
    if result.metric_value is not None:
        return f"{result.metric_value:.2f}", f"{result.step:,}"
    loss = result.validation_loss
    return "" if loss is None else f"loss {loss:.3g}", f"{result.step:,}"


def score_of(run: RunData) -> str:
    return f"{run.trained.metrics['overall']:.2f}" if run.trained else ""


def state_of(run: RunData) -> str:
    """Finished; or at which step it is, or was stopped."""
    from finetune.system.lock import is_held

    if run.result and run.result.finished:
        return "finished"
    step = f"at step {run.lines[-1]['step']:,}" if run.lines else "before its first log"
    return f"training, {step}" if is_held(run.directory / "run.lock") else f"stopped {step}"


def differences_of(runs: dict[str, RunData]) -> dict[str, dict[str, str]]:
    """Of each run, the keys that lead to another result and that not all runs have the same value of, as far as the run
    has them; none where there is one run, or no difference.
    """
    from finetune.config.schema import RunConfig
    from finetune.config.section import Effect
    from finetune.training.resume import flat

    values = {name: flat(run.config.model_dump(mode="json")) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for of_one in values.values() for key in of_one))
    differing = [
        key
        for key in keys
        if RunConfig.effect_of(key) is Effect.RESULT and len({repr(of_one.get(key)) for of_one in values.values()}) > 1
    ]
    if not differing:
        return {}
    return {
        name: {key: str(of_one[key]) for key in differing if key in of_one and not is_unused(key, of_one[key])}
        for name, of_one in values.items()
    }


def is_unused(key: str, value: object) -> bool:
    """Whether this is a key of a source of examples, of which there are many kinds, that is not given."""
    return value is None and key.startswith(("data.train.", "data.validation."))


def table_of_differences(differing: dict[str, dict[str, str]]) -> Table:
    from finetune.system.console import new_table

    table = new_table("run", "what differs in the configurations")
    for name, values in differing.items():
        table.add_row(name, "\n".join(f"{key}: {value}" for key, value in values.items()))
    return table


if __name__ == "__main__":
    cli.run(main)
