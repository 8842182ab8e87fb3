"""The recipes whose steps are compared, on a base in bf16 (benchmarks/train_step.py says what they are)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import arms
from benchmarks.acceptance.bench import Bench

CONTENDERS: dict[str, Callable[[Bench], arms.Arm]] = {
    "ours": lambda bench: arms.ours_on(bench.adapted(torch.bfloat16), "nothing"),
    "ours-recompute": lambda bench: arms.ours_on(bench.adapted(torch.bfloat16), "layers"),
    "tuned": lambda bench: arms.tuned_on(bench.library(torch.bfloat16), bench.adapter_directory(), False),
    "tuned-checkpointing": lambda bench: arms.tuned_on(bench.library(torch.bfloat16), bench.adapter_directory(), True),
    "documented": lambda bench: arms.documented_on(bench.library(torch.bfloat16), bench.adapter_directory()),
}
