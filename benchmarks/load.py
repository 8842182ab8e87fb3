"""Opening a checkpoint beside the library's `from_pretrained`, into bfloat16: time, and peak memory above the start.

    python -m benchmarks.load --checkpoint DIR --checkpoint-fp32 DIR --output benchmarks/RESULTS.md

The files are read once before the rounds, so that every arm finds them in the page cache. A check of a sample of every
tensor comes with each turn: what was loaded must be the same.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import side_by_side
from benchmarks.random_checkpoint import write_checkpoint
from finetune import cli
from finetune.system.paths import path_argument
from model import PaliGemma

NAME = "benchmarks.load"
ARMS = ("ours", "library")
SAMPLE = 4097  # every so many elements are looked at


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = side_by_side.start(arguments)
    # Importing is not loading: the library would do it on the way.
    from transformers import GemmaModel, PaliGemmaForConditionalGeneration, SiglipVisionModel  # noqa: F401

    since = side_by_side.reset_peak(torch.device("cpu"))
    before, begin = side_by_side.status_gib("VmRSS"), time.perf_counter()
    if arguments.arm == "ours":
        model: Any = PaliGemma.from_pretrained(arguments.case / "checkpoint", dtype=dtype, device=device)
    else:
        model = side_by_side.library_model(arguments.case / "checkpoint", dtype, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    above = side_by_side.status_gib("VmHWM") - before
    parameters = list(model.parameters())
    weights = sum(parameter.numel() * parameter.itemsize for parameter in parameters) / side_by_side.GIB
    sample = math.fsum(parameter.detach().flatten()[::SAMPLE].double().sum().item() for parameter in parameters)
    measured = {"seconds": seconds, "above": above, "weights": weights, "relative": above / weights, "sample": sample}
    return measured | {"since": since}


def compare(case: Path, arguments: argparse.Namespace) -> list[str]:
    """The tables of one checkpoint."""
    for file in sorted((case / "checkpoint").glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.read(2**24):
                pass
    results = side_by_side.by_turns(NAME, ARMS, case, arguments)
    loaded = {arm: {(entry["weights"], entry["sample"]) for entry in entries} for arm, entries in results.items()}
    if len(set().union(*loaded.values())) > 1:
        side_by_side.refuse([f"{arm} loaded (GiB, sample) {sorted(what)}" for arm, what in loaded.items()])
    weighed = {"s": "seconds", "peak RSS above the start, GiB": "above"}
    others = {"weights, GiB": "weights", "peak above the start / weights": "relative"}
    return side_by_side.compared(results, weighed, others)


def main(argv: Sequence[str]) -> None:
    parser = side_by_side.parser(NAME, __doc__)
    parser.add_argument("--checkpoint-fp32", type=path_argument, help="the same in fp32; with --tiny one is made")
    if (arguments := side_by_side.parse(parser, argv, list(ARMS), run_arm)) is None:
        return
    with side_by_side.workplace(arguments) as (place, checkpoint):
        wide = arguments.checkpoint_fp32
        if arguments.tiny and wide is None:
            write_checkpoint(wide := place / "fp32", side_by_side.TINY, torch.float32, seed=0)
        parts = []
        for name, directory in (("bfloat16", checkpoint), ("float32", wide)):
            if directory is not None:
                case = side_by_side.write_case(place / name, directory.resolve(), {})
                parts += [f"From {name} into {arguments.dtype}:", *compare(case, arguments)]
    side_by_side.report(NAME, argv, arguments.output, parts)


if __name__ == "__main__":
    cli.run(main)
