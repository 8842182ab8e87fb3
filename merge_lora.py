"""Adapter + base -> a plain checkpoint, verified by logits before and after it is written.

    python merge_lora.py runs/NAME/adapter --output runs/NAME/merged

Needs memory for one fp32 copy of the network (11.7 GB for PaliGemma 3B) and a little more. An adapter that was
trained on an NF4 base goes into the full-precision base, or with --into dequantized into the weights that NF4 stands
for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune import cli
from finetune.report.push import add_arguments
from finetune.system.paths import argument, path_argument


def main(argv: Sequence[str]) -> None:
    arguments = build_parser().parse_args(argv)

    # Only now: --help does without torch, whose import takes seconds.
    from finetune.adapters.locate import find_adapter, find_base
    from finetune.adapters.merge import merge_checkpoint
    from finetune.report.model_card import show_card
    from finetune.report.push import push, requested
    from finetune.system import console
    from finetune.system.device import pick_device, pick_dtype
    from finetune.system.lock import locked
    from model import PaliGemmaConfig

    pushed = requested(arguments, arguments.output)
    adapter, base, revision = find_adapter(arguments.adapter), arguments.base, arguments.revision
    if base is None:
        try:
            base, named = find_base(adapter)
        except ValueError as error:
            raise ValueError(f"{error} (--base)") from error
        revision = revision or named
    if arguments.dtype == "bfloat16" and trained_dtype(adapter) == "float32":
        console.show(
            "the adapter was trained on weights in float32, the merged ones are bfloat16: --dtype float32 keeps it"
        )
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    output, into, force = arguments.output, arguments.into, arguments.force
    with locked(output.with_name(f".{output.name}.lock"), output, "merging"):
        report = merge_checkpoint(base, adapter, output, dtype, device, revision, into, force)
        show_card(output, adapter)
    console.show(str(report), f"verified, and written to {output}")
    if not PaliGemmaConfig.from_directory(output).is_published:
        console.show(f"{output} opens in this toolkit alone: transformers has no such connector, tiles or padding")
    if pushed:
        push(pushed)


def trained_dtype(adapter: Path) -> str | None:
    """What the base's weights were kept in while the adapter was trained; None where its run is not beside it."""
    from finetune.config.load import load_config

    try:
        return load_config(adapter.parent / "config.yaml").model.dtype
    except ValueError:
        return None


def build_parser() -> argparse.ArgumentParser:
    parser = cli.script_parser("merge_lora.py", __doc__)
    parser.add_argument("adapter", type=path_argument, help="directory of the adapter, ours or PEFT's, or of a run")
    parser.add_argument("--output", type=path_argument, required=True, help="directory to write the checkpoint to")
    parser.add_argument("--base", type=argument, help="the base checkpoint; default: the one that the adapter names")
    parser.add_argument("--revision", help="of a base on the Hub; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=list(cli.DTYPES), default="bfloat16", help="of the merged weights")
    parser.add_argument(
        "--into", choices=["full", "dequantized"], default="full", help="which base, for an adapter trained on NF4"
    )
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, ...")
    parser.add_argument("--force", action="store_true", help="overwrite the merged checkpoint at --output")
    add_arguments(parser, "the merged checkpoint")
    return parser


if __name__ == "__main__":
    cli.run(main)
