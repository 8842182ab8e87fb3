"""One training step with each connector, trained in full beside LoRA: time, peak memory, and what the plan says of it.

    python -m benchmarks.random_checkpoint --output /tmp/paligemma-3b-random
    python -m benchmarks.connector_step --checkpoint /tmp/paligemma-3b-random --output benchmarks/RESULTS.md

A step: images through tower and connector, forward, backward, AdamW on fp32 adapters (rank 16, all language linears)
and the connector's fp32 weights, gradients dropped. Rows of one image, 13 prefix and 3 supervised tokens; nothing is
recomputed. Planned and measured are bytes without what libraries take (on a CPU what the process had before it opened
the network), so that the two are of the same things; a CPU's peak has what the system gives out in whole pages, too.

First a check: a dense connector starts as the published one, so its first loss is that of `linear`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import side_by_side
from benchmarks.arms import PREFIX_TOKENS, RANK, SUFFIX_TOKENS, Arm, make_batch, take_step
from finetune import cli
from finetune.lora.linear import LoRAConfig, inject_lora
from finetune.lora.protocol import trained_parameters
from finetune.preflight.plan import CONTEXT, GIB, Planner
from finetune.training.execution_plan import ExecutionPlan
from model import ConnectorConfig, PaliGemma
from model.config import CONNECTORS
from model.convert import changed, convert

NAME = "benchmarks.connector_step"
DEFAULT = ("linear", "dense_dci", "resampler")
SAME_START = ("linear", "dense_sci", "dense_dci")  # bit for bit
LORA = LoRAConfig(rank=RANK, alpha=RANK, modules_to_save=("connector.*",))
COLUMNS = {  # heading -> what was measured, and digits after the point
    "image tokens": ("image_tokens", 0),
    "trained, millions": ("trained", 2),
    "s/step": ("seconds", 3),
    "peak, GiB": ("peak", 3),
    "planned, GiB": ("planned", 3),
    "first loss": ("loss", 4),
}


def open_arm(model: PaliGemma) -> Arm:
    """What is trained, and the loss of a batch, with a graph through the connector."""

    def loss(batch: dict[str, Tensor]) -> Tensor:
        result = model(**batch).loss
        assert isinstance(result, Tensor), "labels were given"
        return result

    return trained_parameters(model), loss


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a step with one connector measures."""
    device, dtype = side_by_side.start(arguments)
    before = 0.0 if device.type == "cuda" else side_by_side.status_gib("VmRSS")
    model = PaliGemma.from_pretrained(arguments.case, dtype, device)
    convert(model, changed(model.config, ConnectorConfig(arguments.arm)))
    inject_lora(model, LORA)
    arm = open_arm(model.train())
    batch = {name: tensor.to(device) for name, tensor in make_batch(model.config, arguments.batch).items()}
    step = take_step(arm)
    since = side_by_side.reset_peak(device)
    measured = step(batch, True)
    seconds = side_by_side.timed(lambda: step(batch, False), arguments.steps, device)
    peaks = side_by_side.peaks(device)
    return {
        "seconds": seconds,
        "peak": peaks.get("reserved", peaks.get("rss", 0.0)) - before,
        "planned": planned(model, arguments.batch, dtype, device),
        "image_tokens": model.config.num_image_tokens,
        "trained": sum(parameter.numel() for parameter in arm[0].values()) / 1e6,
        "since": since,
        **peaks,
        **measured,
    }


def planned(model: PaliGemma, rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """GiB of the step by the plan, without the libraries' own memory."""
    tokens = model.config.num_image_tokens + PREFIX_TOKENS + SUFFIX_TOKENS
    planner = Planner(model.config, LORA, dtype, tokens, SUFFIX_TOKENS, rows, device)
    return (planner.plan(ExecutionPlan(rows), 0).total - CONTEXT) / GIB


def other_starts(results: side_by_side.Results) -> list[str]:
    """Connectors that should start as the published one, and do not."""
    losses = {arm: found[0]["loss"] for arm, found in results.items() if arm in SAME_START and "loss" in found[0]}
    expected = losses.get("linear", next(iter(losses.values()), 0.0))
    return [f"{arm}: first loss {loss} instead of {expected}" for arm, loss in losses.items() if loss != expected]


def table(results: side_by_side.Results) -> str:
    """A row a connector, median (smallest..largest) of the rounds, with planned over measured memory at the end."""
    body = [["connector", *COLUMNS, "planned / peak"]]
    for arm, found in results.items():
        fitted = [entry for entry in found if "seconds" in entry]
        cells = [side_by_side.spread([entry[key] for entry in fitted], digits) for key, digits in COLUMNS.values()]
        ratio = side_by_side.spread([entry["planned"] / entry["peak"] for entry in fitted], 2)
        body.append([arm, *cells, ratio])
    return side_by_side.rows(body)


def main(argv: Sequence[str]) -> None:
    parser = side_by_side.parser(NAME, __doc__)
    parser.add_argument("--batch", type="positive", default=1, help="rows of a step (default: %(default)s)")
    parser.add_argument(
        "--connectors",
        nargs="+",
        choices=CONNECTORS,
        default=DEFAULT,
        metavar="CONNECTOR",
        help=f"of {', '.join(CONNECTORS)} (default: {', '.join(DEFAULT)})",
    )
    if (arguments := side_by_side.parse(parser, argv, CONNECTORS, run_arm)) is None:
        return
    with side_by_side.workplace(arguments) as (_, checkpoint):
        rows = str(arguments.batch)
        results = side_by_side.by_turns(NAME, arguments.connectors, checkpoint, arguments, "--batch", rows)
    side_by_side.refuse(other_starts(results))
    since = sorted({entry["since"] for found in results.values() for entry in found if "since" in entry})
    note = f"Batch {arguments.batch}, {arguments.dtype}. Peak since {' or '.join(since)}."
    side_by_side.report(NAME, argv, arguments.output, [table(results), note])


if __name__ == "__main__":
    cli.run(main)
