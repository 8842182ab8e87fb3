"""`paligemma-lora COMMAND ...`, or `python -m finetune COMMAND ...`: the scripts of the checkout, from any directory.

`paligemma-lora train ARGUMENTS` is `python train.py ARGUMENTS`: the same `main`, messages and exit code.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune import cli

MODULES = {  # of the commands that are no scripts
    "push": "finetune.report.push",
    "report": "finetune.report.__main__",
    "demo": "finetune.demo.__main__",
    "runs": "finetune.report.runs",
    "config": "finetune.config.__main__",
    "convert": "data.convert",
    "preferences": "data.preferences",
}
CHECKOUT = Path(__file__).parents[1]
SUMMARIES = {
    "train": "fine-tune an adapter, as a YAML file says",
    "evaluate": "VQA accuracy of a run, a checkpoint, or a file of answers",
    "predict": "image and prompt -> answer",
    "merge": "adapter + base -> a plain checkpoint",
    "push": "an adapter or a checkpoint onto the Hugging Face Hub",
    "report": "an HTML page of a run, or of several beside each other",
    "demo": "a page in the browser that asks base and adapters",
    "runs": "the runs of a directory as a table",
    "config": "every key of the YAML file, or its JSON schema for editors",
    "convert": "any source of examples -> JSON lines",
    "preferences": "a network's own answers -> preference pairs",
}


def main() -> None:
    """The console script."""
    cli.run(dispatch)


def dispatch(argv: Sequence[str]) -> None:
    """Call the `main` of the command that comes first, with what follows it."""
    if not argv or argv[0] in ("-h", "--help"):
        build_parser().parse_args(["--help"])
    name, *arguments = argv
    if name not in SUMMARIES:
        names = {command: command for command in SUMMARIES} | {file: command for command, file in cli.SCRIPTS.items()}
        meant = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {names[meant[0]]}?" if meant else f"expected {', '.join(SUMMARIES)}"
        raise ValueError(f"unknown command {name!r}; {hint}")
    importlib.import_module(module_of(name)).main(arguments)


def module_of(command: str) -> str:
    """The module whose `main` a command is; a script is found in the checkout, before anything else of its name."""
    if command not in cli.SCRIPTS:
        return MODULES[command]
    file = CHECKOUT / cli.SCRIPTS[command]
    if not file.is_file():
        raise ValueError(f"{file} does not exist; install the checkout as it is: pip install --editable .")
    if sys.path[0] != str(CHECKOUT):
        sys.path.insert(0, str(CHECKOUT))
    return file.stem


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=cli.CONSOLE,
        usage="%(prog)s COMMAND ...",
        description="LoRA fine-tuning of PaliGemma.",
        epilog=f"{cli.CONSOLE} COMMAND --help says what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_argument_group("commands")
    for name, summary in SUMMARIES.items():
        commands.add_argument(name, nargs="?", help=summary)
    return parser


if __name__ == "__main__":
    main()
