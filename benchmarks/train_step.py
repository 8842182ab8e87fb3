"""One training step beside transformers + PEFT: time, peak memory, and on a GPU the largest batch.

    python -m benchmarks.train_step --checkpoint DIR --batch 1 --output benchmarks/RESULTS.md
    python -m benchmarks.train_step --checkpoint DIR --device cuda --cap-gib 6.9 --largest

A step: images through the tower, forward, backward, AdamW on fp32 adapters (rank 16, all language linears), gradients
dropped. Rows of one image, 13 prefix and 3 supervised tokens. What is compared:

    ours, ours-recompute                 nothing, or all layers computed again in the backward pass
    documented            the library's recipe: fp32 adapters under bf16 autocast, all logits, checkpointing
    documented-keeping    the same without checkpointing
    tuned                 logits of supervised rows only, adapters in the base's dtype (the optimizer keeps fp32
                          copies), vision without a graph, no autocast
    tuned-checkpointing   the same with checkpointing
    ours-fp32, tuned-fp32   ours and tuned with the base in fp32, whatever --dtype says: what a CPU without bf16
                          instructions is best at, in twice the memory
    ours-nf4, ours-nf4-recompute, documented-nf4   the decoder's linears in NF4 (needs bitsandbytes); the library's is
                          the documented recipe on a base quantised as it documents, the vision tower left as it is

First the gate, in fp32 on two layers of each tower: every arm's loss within 1e-5 of the documented recipe's on the same
kind of base, every gradient within 1e-4 of its norm.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import side_by_side
from benchmarks.arms import ARMS, DENSE, RANK, REFERENCES, USUAL, make_batch, take_step
from finetune import cli
from finetune.system.paths import path_argument
from model import PaliGemmaConfig

NAME = "benchmarks.train_step"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # fp32 against fp32: other orders of summation


def run_arm(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one arm measures; with --gradients its loss and gradients alone, which go into that file."""
    device, dtype = side_by_side.start(arguments)
    trained, loss_of = ARMS[arguments.arm](arguments.case, dtype, device)
    batch = side_by_side.read_batch(arguments.case, device)
    batch = {name: torch.cat([t] * -(-arguments.batch // len(t)))[: arguments.batch] for name, t in batch.items()}
    if arguments.gradients:
        loss = loss_of(batch)
        torch.autograd.backward(loss)
        got = {name: p.grad.float().cpu().contiguous() for name, p in trained.items() if p.grad is not None}
        save_file(got, arguments.gradients)
        return {"loss": loss.item()}

    step = take_step((trained, loss_of))
    since = side_by_side.reset_peak(device)
    measured = step(batch, True)
    seconds = side_by_side.timed(lambda: step(batch, False), arguments.steps, device)
    return {"seconds": seconds, **side_by_side.peaks(device), **measured, "since": since}


def gate(case: Path, arms: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """Every way in which an arm differs, in fp32, from the documented recipe on the same kind of base."""

    def run(arm: str) -> tuple[float, dict[str, Tensor]]:
        file = case / f"{arm}.safetensors"
        more = ["--batch", "2", "--gradients", str(file)]
        loss: float = side_by_side.fresh(NAME, arm, case, side_by_side.exactly(arguments), *more)["loss"]
        return loss, load_file(file)

    problems = []
    for reference in REFERENCES:
        others = [arm for arm in arms if arm != reference and (arm in DENSE) == (reference in DENSE)]
        if not others:
            continue
        wanted_loss, wanted = run(reference)
        for arm in others:
            loss, got = run(arm)
            if not abs(loss - wanted_loss) <= LOSS_TOLERANCE:
                problems.append(f"{arm}: loss {loss:.7f} instead of {wanted_loss:.7f}")
            if got.keys() != wanted.keys():
                problems.append(f"{arm}: gradients of other parameters: {sorted(got.keys() ^ wanted.keys())[:5]}")
            for name in got.keys() & wanted.keys():
                error = ((got[name] - wanted[name]).norm() / wanted[name].norm()).item()
                if not error <= GRADIENT_TOLERANCE:
                    problems.append(f"{arm}: gradient of {name} is off by {error:.1e} of its norm")
    return problems


def find_largest(attempt: Callable[[int], dict[str, Any] | None], first: int) -> dict[int, dict[str, Any]]:
    """What fitted: batch size -> measurements. Doubles from `first` until an attempt finds no room, then bisects."""
    fitted: dict[int, dict[str, Any]] = {}
    low, high, size = 0, None, first
    while high is None or high - low > 1:
        if (measured := attempt(size)) is None:
            high = size
        else:
            low, fitted[size] = size, measured
        size = 2 * low if high is None else (low + high) // 2
    return fitted


def largest(case: Path, arms: Sequence[str], arguments: argparse.Namespace) -> str:
    """A table of each arm's largest batch and of its speed at its best."""
    body = [["arm", "largest batch", "samples/s at its best", "with batch", "reserved there, GiB"]]
    for arm in arms:

        def attempt(size: int, arm: str = arm) -> dict[str, Any] | None:
            measured = side_by_side.fresh(NAME, arm, case, arguments, "--batch", str(size))
            print(f"{arm}, batch {size}: {measured}", file=sys.stderr)
            return None if "out of memory" in measured else measured

        fitted = find_largest(attempt, arguments.batch)
        if not fitted:
            body.append([arm, "none", "", "", ""])
            continue
        best = max(fitted, key=lambda size: size / fitted[size]["seconds"])
        speed = f"{best / fitted[best]['seconds']:.2f}"
        body.append([arm, str(max(fitted)), speed, str(best), f"{fitted[best]['reserved']:.2f}"])
    return side_by_side.rows(body)


def main(argv: Sequence[str]) -> None:
    parser = side_by_side.parser(NAME, __doc__)
    parser.add_argument("--batch", type="positive", default=1, help="rows of a step")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(ARMS),
        default=USUAL,
        metavar="ARM",
        help="default: all but those in fp32 and NF4",
    )
    parser.add_argument(
        "--largest", action="store_true", help="on a GPU: find each arm's largest batch, from --batch on"
    )
    parser.add_argument(
        "--gradients", type=path_argument, help="for --arm: write the gradients of one pass there, and stop"
    )
    if (arguments := side_by_side.parse(parser, argv, list(ARMS), run_arm)) is None:
        return
    if arguments.largest and not arguments.device.startswith("cuda"):
        raise ValueError("--largest looks for the end of a GPU's memory: it needs --device cuda")
    with side_by_side.workplace(arguments) as (place, checkpoint):
        config = PaliGemmaConfig.from_directory(checkpoint)
        shallow = side_by_side.write_shallow(checkpoint, place / "layers")
        case = side_by_side.write_case(place / "gate", shallow, make_batch(config, 2), RANK)
        side_by_side.refuse(gate(case, arguments.arms, arguments))
        case = side_by_side.write_case(place / "case", checkpoint, make_batch(config, arguments.batch), RANK)
        if arguments.largest:
            parts = [largest(case, arguments.arms, arguments)]
        else:
            results = side_by_side.by_turns(NAME, arguments.arms, case, arguments, "--batch", str(arguments.batch))
            weighed = {"s/step": "seconds", **side_by_side.MEMORY[torch.device(arguments.device).type]}
            parts = side_by_side.compared(results, weighed, {"loss": "loss", "gradient norm": "gradient"})
        passed = f"Gate passed in fp32: loss within {LOSS_TOLERANCE}, gradients within {GRADIENT_TOLERANCE}."
        if set(arguments.arms) <= set(REFERENCES):
            passed = "No gate: there is nothing to compare."
        parts.append(f"From batch {arguments.batch}, {arguments.dtype}. {passed}")
        side_by_side.report(NAME, argv, arguments.output, parts)


if __name__ == "__main__":
    cli.run(main)
