"""Checks, what they find, and their run: a line for each finding at once, and a JSON file that is whole at any moment.

A part is a list of checks, the most important first. Each check is a generator of findings, so that what it found
before it broke or was cut off is kept. A part has a time budget: what gets no turn is listed as skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.acceptance.bench import Bench

OURS = ("benchmarks", "data", "finetune", "model")  # what cannot be imported of these is a failure


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came out of a check.

    Attributes:
        figure: what was measured, or why nothing was.
        bound: what the figure had to keep to; empty where nothing was asked of it.
        details: numbers for the JSON file.
    """

    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    figure: str
    bound: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status} {self.name} {self.figure}" + (f" ({self.bound})" if self.bound else "")


Check = Callable[[Bench], Iterator[Finding]]
Part = dict[str, Check]  # by name, the most important first


NO_BOUND = "no bound"


class SkippedError(Exception):
    """A check cannot be made here; says why."""


class BudgetSpent(BaseException):
    """The time budget of a part ended within a check."""


def judged(name: str, passed: bool, figure: str, bound: str, **details: Any) -> Finding:
    """PASS or FAIL."""
    return Finding(name, "PASS" if passed else "FAIL", figure, bound, details)


def at_most(name: str, value: float, limit: float, unit: str = "", **details: Any) -> Finding:
    """PASS where a value is no number above the limit."""
    unit = f" {unit}" if unit else ""
    return judged(name, value <= limit, f"{value:.3g}{unit}", f"<= {limit:.3g}{unit}", **details, value=value)


def imported(module: str, name: str) -> Check:
    """A check of another module, which is imported in the check's turn: for modules that need more packages."""

    def check(bench: Bench) -> Iterator[Finding]:
        yield from getattr(importlib.import_module(f"benchmarks.acceptance.{module}"), name)(bench)

    return check


class Report:
    """The findings of a run.

    Args:
        output: the JSON file, written anew after each finding; None for lines alone.
        facts: about machine and run, for the head of the file.
    """

    def __init__(self, output: Path | None, facts: dict[str, Any]) -> None:
        self.output, self.facts = output, facts
        self.findings: list[Finding] = []
        self.began = time.monotonic()
        self.write()

    @property
    def failed(self) -> bool:
        return any(finding.status == "FAIL" for finding in self.findings)

    def add(self, finding: Finding) -> None:
        print(finding, flush=True)
        elapsed = {"elapsed_s": round(time.monotonic() - self.began, 2)}
        self.findings.append(dataclasses.replace(finding, details=finding.details | elapsed))
        self.write()

    def write(self) -> None:
        if self.output is None:
            return
        document = {**self.facts, "findings": [dataclasses.asdict(finding) for finding in self.findings]}
        temporary = self.output.with_name(f".{self.output.name}.tmp")
        temporary.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, self.output)


def run_part(name: str, part: Part, bench: Bench, report: Report, budget: float) -> None:
    """Every check of a part in its turn, within `budget` seconds; a check that breaks is a FAIL, and the rest go on."""
    end = time.monotonic() + budget
    for check, run in part.items():
        if (left := end - time.monotonic()) <= 0:
            report.add(Finding(f"{name}.{check}", "SKIP", f"not started: the part's {budget:.0f} s are spent"))
            continue
        begin = time.monotonic()
        try:
            with cut_off(left):
                for finding in run(bench):
                    report.add(dataclasses.replace(finding, name=f"{name}.{finding.name}"))
        except BudgetSpent:
            reason = f"cut off after {time.monotonic() - begin:.0f} s: the part's {budget:.0f} s are spent"
            report.add(Finding(f"{name}.{check}", "SKIP", reason))
        except SkippedError as reason:
            report.add(Finding(f"{name}.{check}", "SKIP", str(reason)))
        except Exception as error:
            report.add(broken(f"{name}.{check}", error))
        bench.release()  # outside of the except blocks: an error holds on to what its frames hold


def broken(name: str, error: Exception) -> Finding:
    """What to say of a check that raised: SKIP where a package is missing that is not ours, else FAIL."""
    said = (str(error).strip().splitlines() or [""])[0][:300]
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] not in OURS:
        return Finding(name, "SKIP", f"cannot be imported: {said}")
    text = "".join(traceback.format_exception(error))[-4000:]
    return Finding(name, "FAIL", f"raised {type(error).__name__}: {said}", "", {"traceback": text})


@contextlib.contextmanager
def cut_off(seconds: float) -> Iterator[None]:
    """Raise BudgetSpent in here once so many seconds are over; where there are no such signals, nothing happens."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise BudgetSpent

    begin, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if outer:  # whoever had set the timer before us still wants it
            signal.setitimer(signal.ITIMER_REAL, max(0.001, outer - (time.monotonic() - begin)))


def summary(findings: Sequence[Finding]) -> str:
    counts = {status: sum(f.status == status for f in findings) for status in ("PASS", "FAIL", "SKIP")}
    return ", ".join(f"{count} {status}" for status, count in counts.items())
