"""A first meeting with a GPU, short and conclusive: is it right, does it fit, how fast is it.

    python -m benchmarks.gpu_acceptance --part correctness --output acceptance-correctness.json
    python -m benchmarks.gpu_acceptance --part memory --output acceptance-memory.json
    python -m benchmarks.gpu_acceptance --part speed --output acceptance-speed.json

Each part takes at most nine minutes on an H100, and its checks come in the order of their importance: what got no turn
is listed. For each finding there is a line, PASS, FAIL or SKIP, with the figure and its bound, and the JSON file is
written anew, so that a run that is killed leaves what it found. The exit code is 1 if anything failed.

Networks of PaliGemma 3B's dimensions get random weights on the device: nothing is downloaded, and at most 2 GB are
written, to the temporary directory. `correctness` takes 60 GiB of the device's memory, `speed` 45, `memory` 8;
`--size small`, which has two layers of each tower, a quarter of it. `--device cpu --size tiny` tries the checks.

It needs torch, transformers, PEFT, accelerate, safetensors, tokenizers and pillow, and for the trainer and the plan
pydantic and pyyaml; bitsandbytes and liger-kernel have checks of their own. A check that lacks a package is skipped
with its name. For a machine without network, fetch wheels for its Python elsewhere and bring them along:

    pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 --no-deps -d wheels \\
        pydantic pydantic-core annotated-types typing-inspection bitsandbytes liger-kernel psutil rich tqdm
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.acceptance.bench import SIZES, Bench
from benchmarks.acceptance.card import Card, facts
from benchmarks.acceptance.findings import Report, run_part, summary
from finetune import cli

NAME = "benchmarks.gpu_acceptance"
PARTS = ("correctness", "memory", "speed")
BUDGET = 540  # seconds


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, help="default: all, one after the other")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--size", choices=list(SIZES), default="true", help="dimensions of the networks")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for each part; default %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file with all findings")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    card = Card(arguments.device)
    command = shlex.join(["python", "-m", NAME, *argv])
    report = Report(arguments.output, {"command": command, "size": arguments.size, **facts(card)})
    for part in [arguments.part] if arguments.part else PARTS:
        with tempfile.TemporaryDirectory(prefix="acceptance-") as directory:
            bench = Bench(card, arguments.size, Path(directory))
            checks = importlib.import_module(f"benchmarks.acceptance.{part}").CHECKS
            run_part(part, checks, bench, report, arguments.budget)
    print(summary(report.findings))
    if report.failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
