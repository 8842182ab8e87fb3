"""Adapter + base -> a plain checkpoint, verified by logits before and after it is written.

    python merge_lora.py runs/NAME/adapter --output runs/NAME/merged

Needs memory for one fp32 copy of the network (11.7 GB for PaliGemma 3B) beside a little. An adapter that was trained on
an NF4 base goes into the full-precision base, or with --into dequantized into the weights that NF4 stands for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from finetune import cli
from finetune.adapter import CONFIG_FILE
from finetune.device import DTYPES, pick_device, pick_dtype
from finetune.merge import merge_checkpoint


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="merge_lora.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, help="directory of the adapter, ours or PEFT's")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the merged checkpoint to")
    parser.add_argument("--base", help="the base checkpoint; default: the one that the adapter names")
    parser.add_argument("--revision", help="of a base on the Hub; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of the merged weights")
    parser.add_argument(
        "--into", choices=["full", "dequantized"], default="full", help="which base, for an adapter trained on NF4"
    )
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, ...")
    parser.add_argument("--force", action="store_true", help="overwrite the merged checkpoint at --output")
    arguments = parser.parse_args(argv)
    base, revision = arguments.base, arguments.revision
    if base is None:
        base, revision = named_base(arguments.adapter, revision)
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    report = merge_checkpoint(
        base, arguments.adapter, arguments.output, dtype, device, revision, arguments.into, arguments.force
    )
    cli.show(str(report), f"verified, and written to {arguments.output}")


def named_base(adapter: Path, revision: str | None) -> tuple[str, str | None]:
    """The base that an adapter names in its configuration."""
    try:
        config = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{adapter} holds no {CONFIG_FILE} that names its base ({error!r}): give --base") from error
    if not base:
        raise ValueError(f"{adapter / CONFIG_FILE} does not name its base: give --base")
    return base, revision or config.get("revision")


if __name__ == "__main__":
    cli.run(main)
