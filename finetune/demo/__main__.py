"""`paligemma-lora demo RUN [RUN ...]`: ask base and adapters in the browser; --export writes a folder to host."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import cli
from finetune.system.paths import argument, path_argument
from finetune.system.terminal import visible

if TYPE_CHECKING:
    from finetune.demo.examples import Example


def main(argv: Sequence[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.model is None and arguments.revision is not None:
        raise ValueError("--revision is of the Hub id that --model gives: give that too")

    # Only now: --help does without torch, whose import takes seconds.
    from finetune.demo.export import export
    from finetune.demo.networks import find_sources, open_networks

    sources = find_sources(arguments.runs, arguments.model, arguments.revision)
    if arguments.export is not None:
        for line in export(sources, examples_of_first(arguments.runs), arguments.export, arguments.dtype):
            print(visible(line))
        return
    from finetune.demo.app import library, serve

    library()  # before minutes are spent on opening a network
    opened = open_networks(sources, arguments.dtype, arguments.device, arguments.quantize)
    serve(opened, examples_of_first(arguments.runs), arguments.host, arguments.port, arguments.batch_size)


def examples_of_first(runs: Sequence[Path]) -> list[Example]:
    """Examples of the first run that has any; where those of a run cannot be read, a line says why."""
    from finetune.demo.examples import examples_of

    for run in runs:
        try:
            if found := examples_of(run):
                return found
        except (ValueError, OSError) as error:
            print(visible(f"no examples of {run}: {error}"), file=sys.stderr)
    return []


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.demo",
        description="A page on which base and adapters answer the same question side by side, on this machine alone "
        "unless --host says otherwise.",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=path_argument, help="directory of a run, or of an adapter")
    add("--model", type=argument, help="checkpoint: a directory or a Hub id; without it, the base the adapters name")
    add("--revision", help="branch, tag or commit of that Hub id")
    add("--export", metavar="DIR", type=path_argument, help="write a folder that can be hosted, and show no page")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (default: %(default)s)")
    add("--port", type=cli.positive, default=7860, help="(default: %(default)s)")
    add("--batch-size", type=cli.positive, default=16, help="covered images at once (default: %(default)s)")
    add("--dtype", choices=list(cli.DTYPES), default="bfloat16", help="of base weights and arithmetic")
    add("--quantize", choices=["auto", "nf4", "none"], default="auto", help=cli.QUANTIZE_HELP)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main)
