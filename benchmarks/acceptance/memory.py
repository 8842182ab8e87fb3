"""Whether what the plan promises fits: under a cap that leaves what a card with 8 GB leaves beside its context.

On a CPU memory is the process's, nothing is capped, and the end of memory is played: the code runs, and what it would
settle is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import arms, side_by_side
from benchmarks.acceptance.bench import Bench
from benchmarks.acceptance.contenders import CONTENDERS
from benchmarks.acceptance.findings import NO_BOUND, Finding, Part, imported, judged
from benchmarks.train_step import find_largest
from finetune.system.device import is_out_of_memory

CAP = 6.95  # GiB for torch's allocator: 8 GB less a display's share and the context


def largest(bench: Bench) -> Iterator[Finding]:
    """The most rows at once under the cap, of each recipe."""
    bench.keep_only(torch.bfloat16)
    bench.adapter_directory()
    rows: dict[str, int] = {}
    for name, make in CONTENDERS.items():
        with bench.card.capped(CAP):
            fitted = find_largest(partial(attempt, bench, make), 1)
        rows[name] = max(fitted, default=0)
        best = max(fitted, key=lambda size: size / fitted[size]["seconds"], default=0)
        speed = best / fitted[best]["seconds"] if best else 0.0
        figure = f"{rows[name]} rows; {speed:.2f} samples/s at its best, with {best}"
        other = {"tuned": "ours", "tuned-checkpointing": "ours-recompute"}.get(name)
        bound = f"no more than {rows[other]}, of {other}" if other else NO_BOUND
        yield judged(f"largest.{name}", other is None or rows[name] <= rows[other], figure, bound, fitted=fitted)


def attempt(bench: Bench, make: Callable[[Bench], arms.Arm], rows: int) -> dict[str, Any] | None:
    """Seconds of a step of so many rows, and its peaks; None where there is no room."""
    try:
        return timed_step(bench, make, rows)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    finally:
        bench.release()
    return None


def timed_step(bench: Bench, make: Callable[[Bench], arms.Arm], rows: int) -> dict[str, Any]:
    bench.card.require_room(rows)
    batch = {name: tensor.to(bench.device) for name, tensor in arms.make_batch(bench.config, rows).items()}
    step = arms.take_step(make(bench))
    bench.card.reset_peak()
    step(batch, False)
    seconds = side_by_side.timed(lambda: step(batch, False), 2, bench.device)
    return {"seconds": seconds, **vars(bench.card.memory())}


CHECKS: Part = {
    "phases": imported("memory_training", "phases"),
    "offload": imported("memory_training", "offload"),
    "recovers": imported("memory_training", "recovers"),
    "recovers.evaluation": imported("memory_training", "evaluation_recovers"),
    "largest": largest,
}
