"""What the scripts share: a person's mistake becomes one message and an exit code, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from finetune.system import terminal
from finetune.system.allocator import use_expandable_segments
from finetune.system.terminal import visible

MISTAKE, NOT_FINITE, STOPPED, INTERRUPTED = 2, 4, 75, 130
CONSOLE, DEBUG = "paligemma-lora", "--debug"
SCRIPTS = {"train": "train.py", "evaluate": "evaluate.py", "predict": "predict.py", "merge": "merge_lora.py"}
DTYPES = ("bfloat16", "float32")  # the names in system/device.py, which imports torch
NEW_TOKENS_HELP = "longest answer, in tokens (default: that of the longest trained answer, stored with the adapter)"
QUANTIZE_HELP = "keep the base in four bits; auto: as it was while the adapter was trained"


class StoppedError(Exception):
    """A run was told to stop, and has saved what it had done; says how to resume it."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call a script's `main` with the command line, and exit: 0; 2 on a mistake or a full disk, 4 on values
    that are not finite, 75 when told to stop (what was done is saved), 130 when stopped at once.

    A launcher of several processes ends them all once one has failed, with an exit code of its own. With --debug an
    error ends it with its traceback instead of a sentence.
    """
    words = [word for word in sys.argv[1:] if word != DEBUG]
    terminal.keep_all_output()
    use_expandable_segments()
    try:
        with terminal.plain_warnings():
            main(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if DEBUG in sys.argv or (code := report(error)) is None:
            raise
        sys.exit(code)
    if "torch" in sys.modules:
        from finetune.system import distributed

        distributed.destroy()


def report(error: Exception) -> int | None:
    """Say what ended a script; returns its exit code, or None for an error of this project, which needs a traceback."""
    from finetune.system import distributed  # imports torch, which --help does without

    if isinstance(error, ValueError | OSError | distributed.ElsewhereError):
        tqdm.write(visible(f"error: {error}"), file=sys.stderr)  # on a line of its own, below any bar
        return MISTAKE
    if not isinstance(error, FloatingPointError | StoppedError):
        return None
    not_finite = isinstance(error, FloatingPointError)  # of all processes of a run alike
    if distributed.is_main():
        tqdm.write(visible(f"error: {error}" if not_finite else str(error)), file=sys.stderr)
    with contextlib.suppress(distributed.ElsewhereError):  # one has ended meanwhile
        distributed.gather("said")  # before one is gone, and the launcher ends the others
    return NOT_FINITE if not_finite else STOPPED


def script_parser(script: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser for the arguments of a script, with its docstring as help."""
    words = called(script)
    parser = argparse.ArgumentParser(
        prog=script if words[-1] == script else " ".join(words),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # `run` takes it off the command line.
    parser.add_argument(DEBUG, action="store_true", help="end an error with its traceback", default=argparse.SUPPRESS)
    return parser


def positive(text: str) -> int:
    """An argument that is a whole number from 1, for `argparse`."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number from 1")
    return int(text)


def called(script: str) -> list[str]:
    """The words that call a script as this one was called: by its name, or as a command of `paligemma-lora`."""
    this = Path(sys.argv[0])
    name = next(name for name, file in SCRIPTS.items() if file == script)
    if this.stem == CONSOLE:
        return [CONSOLE, name]
    return ["python", "-m", "finetune", name] if this == Path(__file__).with_name("__main__.py") else ["python", script]


def command(script: str, *words: str) -> str:
    """A command line to show: a script under the interpreter that runs this one, quoted for a shell."""
    first, *others = called(script)
    if first == "python":
        python, here = Path(sys.executable), Path.cwd()
        first = str(python.relative_to(here) if python.is_relative_to(here) else python)
    return shlex.join([first, *others, *words])


def quantization(asked: str, adapter: str | Path | None) -> str | None:
    """The quantization of the base: as asked, or by default as it was while the adapter was trained."""
    if asked == "auto":
        from finetune.adapters.metadata import trained_on  # imports torch, which --help does without

        return trained_on(adapter) if adapter else None
    return None if asked == "none" else asked
