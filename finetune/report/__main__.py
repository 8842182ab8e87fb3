"""`paligemma-lora report RUN [RUN ...]`: the report of a run, or several runs beside each other, as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune import cli
from finetune.system.paths import path_argument


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.report",
        description="Write RUN/report.html; of several runs a page that shows them beside each other.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=path_argument, help="directory of a run")
    parser.add_argument(
        "--output", type=path_argument, default=Path("comparison.html"), help="of several runs (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)

    # Only now: --help does without torch, whose import takes seconds.
    from finetune.report.page import write_comparison, write_page

    if len(arguments.runs) == 1:
        print(f"report: {write_page(arguments.runs[0])}")
    else:
        print(f"report: {write_comparison(arguments.runs, arguments.output)}")


if __name__ == "__main__":
    cli.run(main)
